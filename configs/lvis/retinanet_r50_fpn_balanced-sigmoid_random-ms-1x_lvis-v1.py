# RetinaNet with the balanced sigmoid loss.
_base_ = './retinanet_r50_fpn_bce_random-ms-1x_lvis-v1.py'

model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type='mmdet_lt.BalancedSigmoidLoss', use_sigmoid=True)
    )
)
