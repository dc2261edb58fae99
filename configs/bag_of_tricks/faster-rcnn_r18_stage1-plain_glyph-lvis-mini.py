# First stage without mixup: 500 of 750 iterations.
_base_ = '../data_order/faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

max_iters = 500
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=750, eta_min=1e-5),
]
