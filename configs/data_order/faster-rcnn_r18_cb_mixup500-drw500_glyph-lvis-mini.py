# The bag of tricks with DRW: mixup for 500 of 750 iterations, then class-balanced weights, muted.
_base_ = './faster-rcnn_r18_cb_drw500_glyph-lvis-mini.py'

custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
    dict(type='mmdet_lt.DeferredRebalancingHook', iteration=500, loss=True),
    dict(type='mmdet_lt.MixupHook', alpha=1.5, mute_iteration=500),
]
