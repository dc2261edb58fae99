# RetinaNet with Gumbel cross entropy. The bias -2.44 is the foreground probability 1e-5 of the
# Gumbel link; the -11.5 that a sigmoid needs for it lies below the clamp of the loss, where the
# gradient is 0 and training would never start.
_base_ = './retinanet_r50_fpn_focal_random-ms-1x_lvis-v1.py'

model = dict(
    bbox_head=dict(
        init_cfg=dict(
            type='Normal',
            layer='Conv2d',
            std=0.01,
            override=dict(type='Normal', name='retina_cls', std=0.01, bias=-2.44),
        ),
        loss_cls=dict(_delete_=True, type='mmdet_lt.GumbelLoss', use_sigmoid=True, mask='none'),
    )
)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
