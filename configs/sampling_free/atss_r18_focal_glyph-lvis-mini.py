# ATSS as published, with its heuristic, focal loss: backbone and pyramid of the RetinaNet.
_base_ = './retinanet_r18_focal_glyph-lvis-mini.py'

model = dict(
    type='ATSS',
    bbox_head=dict(
        _delete_=True,
        type='ATSSHead',
        num_classes=40,
        in_channels=40,
        stacked_convs=2,
        feat_channels=40,
        norm_cfg=dict(type='GN', num_groups=8),
        anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], scales=[5], strides=[4, 8, 16]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
    ),
    train_cfg=dict(assigner=dict(_delete_=True, type='ATSSAssigner', topk=9)),
)
