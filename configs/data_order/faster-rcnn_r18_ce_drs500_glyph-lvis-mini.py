# Deferred re-sampling (DRS): plain for 500 of 750 iterations, class-balanced for the rest.
_base_ = './faster-rcnn_r18_ce_class-balanced_glyph-lvis-mini.py'

custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
    dict(type='mmdet_lt.DeferredRebalancingHook', iteration=500, sampler=True),
]
