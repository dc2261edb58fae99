# Balanced group softmax (BAGS), second stage: a new classifier, softmax only within groups of
# similar frequency, images drawn uniformly.
_base_ = './faster-rcnn_r18_crt_glyph-lvis-mini.py'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
)
model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.GroupSoftmaxLoss',
                use_sigmoid=False,
                bin_split=(10, 100, 1000),
                beta=8.0,
            )
        )
    )
)
