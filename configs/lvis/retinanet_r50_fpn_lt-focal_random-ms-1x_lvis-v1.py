# RetinaNet with this package's focal loss: the values of MMDetection's, and the contract of
# docs/losses.md (soft targets, class weights, anomaly detection).
_base_ = './retinanet_r50_fpn_focal_random-ms-1x_lvis-v1.py'

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True, type='mmdet_lt.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25
        )
    )
)
