# A RetinaNet with the anchors of faster-rcnn_r18-w16_fpn_128px.py: 4,032 an image. The norm in the
# head lets it learn in the first few hundred iterations, whatever the loss.
_base_ = './r18-w16_fpn_128px.py'

model = dict(
    type='RetinaNet',
    bbox_head=dict(
        type='RetinaHead',
        num_classes=40,
        in_channels=40,
        stacked_convs=2,
        feat_channels=40,
        norm_cfg=dict(type='GN', num_groups=8),
        anchor_generator=dict(
            type='AnchorGenerator', scales=[5], ratios=[0.6, 1.0, 1.7], strides=[4, 8, 16]
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[1.0, 1.0, 1.0, 1.0]),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(type='L1Loss', loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0.3),
        sampler=dict(type='PseudoSampler'),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=1e-3,
        nms=dict(type='nms', iou_threshold=0.5),
        max_per_img=100,
    ),
)
