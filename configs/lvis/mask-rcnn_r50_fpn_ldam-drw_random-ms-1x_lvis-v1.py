# LDAM-DRW: class-balanced weights from the first drop of the learning rate on (epoch 9 in the log).
_base_ = './mask-rcnn_r50_fpn_ldam_random-ms-1x_lvis-v1.py'

model = dict(roi_head=dict(bbox_head=dict(loss_cls=dict(beta=0.9999))))
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.DeferredRebalancingHook', epoch=8),
]
