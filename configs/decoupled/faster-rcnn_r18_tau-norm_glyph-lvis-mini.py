# Tau-normalisation: no second stage, test a checkpoint of the first one with this config.
_base_ = '../quickstart/faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

model = dict(
    roi_head=dict(bbox_head=dict(cls_predictor_cfg=dict(type='mmdet_lt.TauNormLinear', tau=0.5)))
)
