# Sampling-Free ATSS: cross entropy in place of the focal loss.
_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmdet_lt'])
custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook'), dict(type='mmdet_lt.OptimalBiasHook')]
model = dict(
    type='mmdet_lt.SamplingFree',
    detector='ATSS',
    bbox_head=dict(loss_cls=dict(_delete_=True, type='CrossEntropyLoss', use_sigmoid=True)),
)
