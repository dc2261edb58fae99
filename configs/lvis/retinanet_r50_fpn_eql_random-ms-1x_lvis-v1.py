# RetinaNet with the equalization loss (EQL); bias and clipping as for plain cross entropy.
_base_ = './retinanet_r50_fpn_bce_random-ms-1x_lvis-v1.py'

model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type='mmdet_lt.EQLLoss', use_sigmoid=True, lambda_=0.0011)
    )
)
