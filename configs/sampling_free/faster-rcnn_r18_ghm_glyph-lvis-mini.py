# Gradient harmonizing loss in RPN and RoI head in place of sampling: all anchors, all proposals.
_base_ = './faster-rcnn_r18_none_glyph-lvis-mini.py'

ghm = dict(_delete_=True, type='mmdet_lt.GHMCLoss', use_sigmoid=True, bins=30, momentum=0.75)
model = dict(
    rpn_head=dict(loss_cls=ghm),
    roi_head=dict(bbox_head=dict(loss_cls=ghm)),
)
