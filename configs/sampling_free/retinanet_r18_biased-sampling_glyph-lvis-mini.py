# Biased sampling in place of the focal loss: cross entropy on 256 anchors of an image.
_base_ = './retinanet_r18_none_glyph-lvis-mini.py'

model = dict(
    train_cfg=dict(
        sampler=dict(
            _delete_=True,
            type='RandomSampler',
            num=256,
            pos_fraction=0.5,
            add_gt_as_proposals=False,
        )
    )
)
