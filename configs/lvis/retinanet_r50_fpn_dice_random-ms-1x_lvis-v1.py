# RetinaNet with the self-adjusting Dice loss and binary cross entropy.
_base_ = './retinanet_r50_fpn_bce_random-ms-1x_lvis-v1.py'

model = dict(
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
