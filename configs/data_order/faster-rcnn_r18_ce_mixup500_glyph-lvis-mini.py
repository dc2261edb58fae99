# Input mixup for 500 of 750 iterations, muted for the rest.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
    dict(type='mmdet_lt.MixupHook', alpha=1.5, mute_iteration=500),
]
