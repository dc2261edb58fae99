# Equalized focal loss (EFL) with the paper's hyper-parameters, images drawn uniformly.
_base_ = './retinanet_r50_fpn_focal_random-ms-1x_lvis-v1.py'

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True,
            type='mmdet_lt.EqualizedFocalLoss',
            use_sigmoid=True,
            focal_gamma=2.0,
            focal_alpha=0.25,
            scale_factor=8.0,
        ),
        # The paper's prior: p = 0.001.
        init_cfg=dict(
            type='Normal',
            layer='Conv2d',
            std=0.01,
            override=dict(type='Normal', name='retina_cls', std=0.01, bias_prob=0.001),
        ),
    )
)

optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
