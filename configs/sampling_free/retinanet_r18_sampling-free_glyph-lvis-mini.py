# Sampling-Free: cross entropy, all anchors, optimal bias, guided loss scaling.
_base_ = './retinanet_r18_focal_glyph-lvis-mini.py'

model = dict(
    type='mmdet_lt.SamplingFree',
    detector='RetinaNet',
    bbox_head=dict(loss_cls=dict(_delete_=True, type='CrossEntropyLoss', use_sigmoid=True)),
)
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.OptimalBiasHook'),
]
