# Tau-normalisation: no second stage, test a checkpoint of the first one with this config.
_base_ = '../lvis/mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(bbox_head=dict(cls_predictor_cfg=dict(type='mmdet_lt.TauNormLinear', tau=0.5)))
)
