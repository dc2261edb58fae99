# Classifier re-training (cRT), second stage: a new classifier on a frozen detector, every class
# drawn equally often. Train both stages with
#   python tools/train_stages.py \
#       configs/quickstart/faster-rcnn_r18_ce_random_glyph-lvis-mini.py \
#       configs/decoupled/faster-rcnn_r18_crt_glyph-lvis-mini.py
_base_ = '../quickstart/faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

train_dataloader = dict(sampler=dict(_delete_=True, type='mmdet_lt.ClassBalancedSampler'))
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.FreezeHook', trainable=['roi_head.bbox_head.fc_cls']),
    dict(type='mmdet_lt.ClassifierInitHook', mode='reinit'),
    dict(type='mmdet_lt.SamplerStateHook'),
]
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='CosineAnnealingLR', by_epoch=False, begin=0, end=max_iters, eta_min=1e-5)
]
