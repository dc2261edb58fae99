# Classifier re-training (cRT), second stage: a new classifier on a frozen Mask R-CNN, every class
# drawn equally often, 75,000 iterations of 16 images. Train both stages with
#   tools/dist_train_stages.sh configs/lvis/mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py \
#       configs/decoupled/mask-rcnn_r50_fpn_crt_lvis-v1.py 8
_base_ = '../lvis/mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

# The checkpoint of the first stage, `load_from`, brings the backbone.
model = dict(backbone=dict(init_cfg=None))
train_dataloader = dict(sampler=dict(_delete_=True, type='mmdet_lt.ClassBalancedSampler'))
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.FreezeHook', trainable=['roi_head.bbox_head.fc_cls']),
    dict(type='mmdet_lt.ClassifierInitHook', mode='reinit'),
    dict(type='mmdet_lt.SamplerStateHook'),
]
max_iters = 75000
train_cfg = dict(
    _delete_=True, type='mmdet_lt.IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=False, milestones=[50000, 70000], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000, max_keep_ckpts=2))
log_processor = dict(by_epoch=False)
