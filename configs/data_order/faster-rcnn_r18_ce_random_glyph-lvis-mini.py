# Plain training that all configs of this folder are compared with: softmax cross entropy, images
# drawn uniformly, 750 iterations (3 passes over the data).
_base_ = '../quickstart/faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

max_iters = 750
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=max_iters, eta_min=1e-5),
]
default_hooks = dict(checkpoint=dict(interval=250))
