# Class-balanced cross entropy (effective number of samples), images drawn uniformly.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True, type='mmdet_lt.ClassBalancedLoss', use_sigmoid=False, beta=0.9999
            )
        )
    )
)
