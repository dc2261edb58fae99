# First stage of the bag of tricks: input mixup, images drawn uniformly.
_base_ = './faster-rcnn_r18_stage1-plain_glyph-lvis-mini.py'

custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
    dict(type='mmdet_lt.MixupHook', alpha=1.5),
]
