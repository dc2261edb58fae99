# Balanced group softmax (BAGS), second stage: only the classifier learns, on a trained softmax
# baseline, for 12 epochs with images drawn uniformly. Train the config below first.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

load_from = 'work_dirs/mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1/epoch_12.pth'
model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.GroupSoftmaxLoss',
                use_sigmoid=False,
                bin_split=(10, 100, 1000),
                beta=8.0,
            )
        )
    )
)
_frozen = dict(lr_mult=0.0, decay_mult=0.0)
optim_wrapper = dict(
    optimizer=dict(lr=0.01),
    clip_grad=dict(max_norm=35, norm_type=2),
    paramwise_cfg=dict(
        custom_keys=dict(
            backbone=_frozen,
            neck=_frozen,
            rpn_head=_frozen,
            shared_fcs=_frozen,
            fc_reg=_frozen,
            mask_head=_frozen,
        )
    ),
)
