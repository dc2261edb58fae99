# Learnable weight scaling (LWS), second stage: one factor for each class of the trained classifier.
_base_ = './mask-rcnn_r50_fpn_crt_lvis-v1.py'

model = dict(roi_head=dict(bbox_head=dict(cls_predictor_cfg=dict(type='mmdet_lt.ScaledLinear'))))
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.FreezeHook', trainable=['roi_head.bbox_head.fc_cls.scale']),
    dict(type='mmdet_lt.ClassifierInitHook', mode='keep'),
    dict(type='mmdet_lt.SamplerStateHook'),
]
# Weight decay would pull the factors to 0; the original classifier has 1.
optim_wrapper = dict(optimizer=dict(weight_decay=0.0))
