# Balanced Softmax, images drawn uniformly, background as one more class of its own frequency.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.BalancedSoftmaxLoss',
                use_sigmoid=False,
                background_ratio=6.3313,
            )
        )
    )
)
