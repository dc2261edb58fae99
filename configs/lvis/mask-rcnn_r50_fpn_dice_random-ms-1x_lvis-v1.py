# Self-adjusting Dice loss with binary cross entropy, images drawn uniformly.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.DiceLoss',
                use_sigmoid=True,
                alpha=1.0,
                smooth=1.0,
                bce_weight=1.0,
            )
        )
    )
)
