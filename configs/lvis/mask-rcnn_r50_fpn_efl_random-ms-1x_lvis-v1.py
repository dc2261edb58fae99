# Equalized focal loss (EFL) in a two-stage detector, images drawn uniformly; the paper's detectors
# have one stage.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.EqualizedFocalLoss',
                use_sigmoid=True,
                focal_gamma=2.0,
                focal_alpha=0.25,
                scale_factor=8.0,
            )
        )
    )
)
