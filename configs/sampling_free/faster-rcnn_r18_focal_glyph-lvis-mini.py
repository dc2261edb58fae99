# Focal loss in RPN and RoI head in place of sampling: all anchors, all proposals.
_base_ = './faster-rcnn_r18_none_glyph-lvis-mini.py'

focal = dict(_delete_=True, type='mmdet_lt.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25)
model = dict(
    rpn_head=dict(loss_cls=focal),
    roi_head=dict(bbox_head=dict(loss_cls=focal)),
)
