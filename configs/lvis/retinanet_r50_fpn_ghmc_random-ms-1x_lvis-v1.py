# Gradient harmonizing loss (GHM-C) with the paper's hyper-parameters, images drawn uniformly. The
# box loss stays that of the base config; the paper's is GHM-R.
_base_ = './retinanet_r50_fpn_focal_random-ms-1x_lvis-v1.py'

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True,
            type='mmdet_lt.GHMCLoss',
            use_sigmoid=True,
            bins=30,
            momentum=0.75,
        ),
    )
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
