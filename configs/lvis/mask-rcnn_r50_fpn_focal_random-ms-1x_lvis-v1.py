# Focal loss in the box head, images drawn uniformly.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True, type='mmdet_lt.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25
            )
        )
    )
)
