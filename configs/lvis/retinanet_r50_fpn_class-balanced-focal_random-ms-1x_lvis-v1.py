# Class-balanced focal loss in a one-stage detector, images drawn uniformly. gamma=2 as in the focal
# loss it replaces: nearly all anchors are easy background.
_base_ = './retinanet_r50_fpn_focal_random-ms-1x_lvis-v1.py'

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True,
            type='mmdet_lt.ClassBalancedFocalLoss',
            use_sigmoid=True,
            gamma=2.0,
            beta=0.9999,
        )
    )
)
