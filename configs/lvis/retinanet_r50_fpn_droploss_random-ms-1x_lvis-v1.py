# RetinaNet with DropLoss; every pyramid level has its own rate of dropping.
_base_ = './retinanet_r50_fpn_bce_random-ms-1x_lvis-v1.py'

model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type='mmdet_lt.DropLoss', use_sigmoid=True, lambda_=0.0011)
    )
)
