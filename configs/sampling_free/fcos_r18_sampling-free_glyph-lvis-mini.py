# Sampling-Free FCOS: cross entropy, optimal bias, guided loss scaling.
_base_ = './fcos_r18_focal_glyph-lvis-mini.py'

custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook'), dict(type='mmdet_lt.OptimalBiasHook')]
model = dict(
    type='mmdet_lt.SamplingFree',
    detector='FCOS',
    bbox_head=dict(loss_cls=dict(_delete_=True, type='CrossEntropyLoss', use_sigmoid=True)),
)
