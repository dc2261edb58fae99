# Sampling-Free Mask R-CNN: all anchors and all proposals.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmdet_lt'])
custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook'), dict(type='mmdet_lt.OptimalBiasHook')]
model = dict(
    type='mmdet_lt.SamplingFree',
    detector='MaskRCNN',
    roi_head=dict(type='mmdet_lt.ChunkedRoIHead'),
    train_cfg=dict(
        rpn=dict(sampler=dict(_delete_=True, type='PseudoSampler')),
        rcnn=dict(sampler=dict(_delete_=True, type='mmdet_lt.AllSampler')),
    ),
)
