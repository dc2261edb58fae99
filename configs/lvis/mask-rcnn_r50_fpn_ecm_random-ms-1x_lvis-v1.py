# Effective class-margin loss (ECM), images drawn uniformly.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            # Cosine classifier, as in the paper: logits within [-20, 20].
            cls_predictor_cfg=dict(type='NormedLinear'),
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.ECMLoss',
                use_sigmoid=True,
                fg_bg_ratio=6.3313,
            ),
        ),
        mask_head=dict(predictor_cfg=dict(type='NormedConv2d')),
    )
)

# At the start a background row pays for every class: the paper warms up long and clips.
optim_wrapper = dict(clip_grad=dict(max_norm=5, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=10000),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
