# Balanced sigmoid loss (BALMS without the meta sampler) with repeat-factor sampling, trained as a
# whole. The paper trains the classifier alone in a second stage.
_base_ = './mask-rcnn_r50_fpn_ce_sample1e-3-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(_delete_=True, type='mmdet_lt.BalancedSigmoidLoss', use_sigmoid=True)
        )
    )
)
