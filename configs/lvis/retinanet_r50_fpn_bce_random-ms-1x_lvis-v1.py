# RetinaNet with binary cross entropy. Losses without a focal factor see every easy anchor at full
# weight: the classifier starts at the foreground probability of 1e-5 instead of 0.01, or the first
# steps would consist of the negatives of 1203 classes.
_base_ = './retinanet_r50_fpn_focal_random-ms-1x_lvis-v1.py'

model = dict(
    bbox_head=dict(
        init_cfg=dict(
            type='Normal',
            layer='Conv2d',
            std=0.01,
            override=dict(type='Normal', name='retina_cls', std=0.01, bias_prob=1e-5),
        ),
        loss_cls=dict(_delete_=True, type='mmdet_lt.BCELoss', use_sigmoid=True),
    )
)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
