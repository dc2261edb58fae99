# Sampling-Free: all anchors, all proposals, optimal bias, guided loss scaling.
_base_ = './faster-rcnn_r18_none_glyph-lvis-mini.py'

model = dict(type='mmdet_lt.SamplingFree', detector='FasterRCNN')
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.OptimalBiasHook'),
]
