# First stage of the bag of tricks on LVIS v1: input mixup for 12 epochs, images drawn uniformly.
_base_ = '../lvis/mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
    dict(type='mmdet_lt.MixupHook', alpha=1.5),
]
