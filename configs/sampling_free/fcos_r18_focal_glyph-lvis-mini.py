# FCOS as published, with its heuristic, focal loss: backbone and pyramid of the RetinaNet.
_base_ = './retinanet_r18_focal_glyph-lvis-mini.py'

model = dict(
    type='FCOS',
    bbox_head=dict(
        _delete_=True,
        type='FCOSHead',
        num_classes=40,
        in_channels=40,
        stacked_convs=2,
        feat_channels=40,
        norm_cfg=dict(type='GN', num_groups=8),
        strides=[4, 8, 16],
        regress_ranges=((-1, 20), (20, 40), (40, 1000)),
        norm_on_bbox=True,
        centerness_on_reg=True,
        center_sampling=True,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=1.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    ),
)
