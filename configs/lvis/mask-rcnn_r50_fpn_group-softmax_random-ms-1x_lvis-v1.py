# Balanced group softmax (BAGS), second stage: a new classifier on a frozen Mask R-CNN, images drawn
# uniformly, 12 epochs, as in the authors' code. `load_from` must name a checkpoint of the config
# below.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    # The checkpoint of the first stage, `load_from`, brings the backbone.
    backbone=dict(init_cfg=None),
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
    ),
)
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.FreezeHook', trainable=['roi_head.bbox_head.fc_cls']),
    dict(type='mmdet_lt.ClassifierInitHook', mode='reinit'),
]
optim_wrapper = dict(optimizer=dict(lr=0.01), clip_grad=dict(max_norm=35, norm_type=2))
