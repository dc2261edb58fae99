"""Detectors for the toy task: ResNet-18 with 8 base channels and a two-level FPN of width 16."""

from __future__ import annotations

from typing import Any


def _body() -> dict[str, Any]:
    return dict(
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[110.0, 110.0, 110.0],
            std=[60.0, 60.0, 60.0],
            pad_size_divisor=32,
        ),
        backbone=dict(
            type='ResNet',
            depth=18,
            base_channels=8,
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(1, 2),
        ),
        neck=dict(type='FPN', in_channels=[16, 32], out_channels=16, num_outs=2),
    )


def retinanet(num_classes: int) -> dict[str, Any]:
    """RetinaNet on two levels."""
    return dict(
        type='RetinaNet',
        **_body(),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=num_classes,
            in_channels=16,
            stacked_convs=1,
            feat_channels=16,
            anchor_generator=dict(
                type='AnchorGenerator',
                octave_base_scale=2,
                scales_per_octave=1,
                ratios=[0.5, 1.0, 2.0],
                strides=[8, 16],
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25),
            loss_bbox=dict(type='L1Loss'),
        ),
        train_cfg=dict(
            assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0),
            sampler=dict(type='PseudoSampler'),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        test_cfg=dict(
            nms_pre=100,
            min_bbox_size=0,
            score_thr=0.0,
            nms=dict(type='nms', iou_threshold=0.5),
            max_per_img=20,
        ),
    )


def faster_rcnn(num_classes: int) -> dict[str, Any]:
    """Faster R-CNN on two levels."""

    def assigner(positive: float, negative: float) -> dict[str, Any]:
        return dict(
            type='MaxIoUAssigner',
            pos_iou_thr=positive,
            neg_iou_thr=negative,
            min_pos_iou=negative,
            match_low_quality=positive > 0.5,
        )

    def sampler(num: int, with_gt: bool) -> dict[str, Any]:
        return dict(type='RandomSampler', num=num, pos_fraction=0.5, add_gt_as_proposals=with_gt)

    return dict(
        type='FasterRCNN',
        **_body(),
        rpn_head=dict(
            type='RPNHead',
            in_channels=16,
            feat_channels=16,
            anchor_generator=dict(
                type='AnchorGenerator', scales=[2], ratios=[0.5, 1.0, 2.0], strides=[8, 16]
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss'),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=5, sampling_ratio=0),
                out_channels=16,
                featmap_strides=[8, 16],
                finest_scale=28,
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=16,
                fc_out_channels=32,
                roi_feat_size=5,
                num_classes=num_classes,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
                reg_class_agnostic=False,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False),
                loss_bbox=dict(type='L1Loss'),
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=assigner(0.7, 0.3),
                sampler=sampler(32, False),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=dict(
                nms_pre=100,
                max_per_img=50,
                nms=dict(type='nms', iou_threshold=0.7),
                min_bbox_size=0,
            ),
            rcnn=dict(
                assigner=assigner(0.5, 0.5),
                sampler=sampler(32, True),
                pos_weight=-1,
                debug=False,
            ),
        ),
        test_cfg=dict(
            rpn=dict(
                nms_pre=100,
                max_per_img=50,
                nms=dict(type='nms', iou_threshold=0.7),
                min_bbox_size=0,
            ),
            rcnn=dict(score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20),
        ),
    )


MODELS = {'retinanet': retinanet, 'faster_rcnn': faster_rcnn}
