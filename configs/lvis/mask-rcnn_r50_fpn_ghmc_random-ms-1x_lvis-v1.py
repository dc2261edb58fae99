# Gradient harmonizing loss (GHM-C) in a two-stage detector, images drawn uniformly; the paper's
# detectors have one stage.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.GHMCLoss',
                use_sigmoid=True,
                bins=30,
                momentum=0.75,
            )
        )
    )
)
