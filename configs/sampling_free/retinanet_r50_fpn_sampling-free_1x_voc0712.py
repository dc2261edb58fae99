# Sampling-Free RetinaNet on PASCAL VOC 07+12.
_base_ = 'mmdet::pascal_voc/retinanet_r50_fpn_1x_voc0712.py'

custom_imports = dict(imports=['mmdet_lt'])
custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook'), dict(type='mmdet_lt.OptimalBiasHook')]
model = dict(
    type='mmdet_lt.SamplingFree',
    detector='RetinaNet',
    bbox_head=dict(loss_cls=dict(_delete_=True, type='CrossEntropyLoss', use_sigmoid=True)),
)
