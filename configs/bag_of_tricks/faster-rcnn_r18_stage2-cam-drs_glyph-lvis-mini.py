# Second stage of the bag of tricks: mixup is muted, objects of classes drawn class-balanced are
# pasted by the class activation maps of the first stage, which `tools/train_stages.py` extracts:
#
# python tools/train_stages.py \
#     configs/bag_of_tricks/faster-rcnn_r18_stage1-mixup_glyph-lvis-mini.py \
#     configs/bag_of_tricks/faster-rcnn_r18_stage2-cam-drs_glyph-lvis-mini.py --work-dir DIR
#
# The learning rate goes on where the first stage left it.
_base_ = '../data_order/faster-rcnn_r18_ce_drs500-mask-paste_glyph-lvis-mini.py'

max_iters = 250
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(optimizer=dict(lr=3.3e-4))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False, end=max_iters, eta_min=1e-5)]
train_dataloader = dict(sampler=dict(mask_source='cam'))
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
]
