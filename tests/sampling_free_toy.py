"""Toy detectors of type SamplingFree and runs with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from toy import toy_config
from toy_models import faster_rcnn, retinanet

BCE = dict(type='CrossEntropyLoss', use_sigmoid=True)
TEST = dict(
    nms_pre=100,
    min_bbox_size=0,
    score_thr=0.0,
    nms=dict(type='nms', iou_threshold=0.5),
    max_per_img=20,
)


def _fcos(base: dict[str, Any]) -> dict[str, Any]:
    head = dict(
        type='FCOSHead',
        num_classes=3,
        in_channels=16,
        stacked_convs=1,
        feat_channels=16,
        strides=[8, 16],
        regress_ranges=((-1, 20), (20, 1000)),
        norm_cfg=None,
        loss_cls=BCE,
        loss_bbox=dict(type='IoULoss'),
        loss_centerness=BCE,
    )
    return dict(base, bbox_head=head, train_cfg=None)


def _atss(base: dict[str, Any], kind: str) -> dict[str, Any]:
    head = dict(
        type=kind,
        num_classes=3,
        in_channels=16,
        stacked_convs=1,
        feat_channels=16,
        norm_cfg=None,
        anchor_generator=dict(
            type='AnchorGenerator',
            ratios=[1.0],
            octave_base_scale=2,
            scales_per_octave=1,
            strides=[8, 16],
        ),
        loss_cls=BCE,
        loss_bbox=dict(type='GIoULoss'),
    )
    if kind == 'ATSSHead':
        head['bbox_coder'] = dict(type='DeltaXYWHBBoxCoder')
        head['loss_centerness'] = BCE
    else:
        head['loss_cls'] = dict(type='QualityFocalLoss', use_sigmoid=True)
        head['loss_dfl'] = dict(type='DistributionFocalLoss')
    train = dict(
        assigner=dict(type='ATSSAssigner', topk=4), allowed_border=-1, pos_weight=-1, debug=False
    )
    return dict(base, bbox_head=head, train_cfg=train)


def plain_model(kind: str) -> dict[str, Any]:
    """Config of a toy detector with three classes and cross entropy, not Sampling-Free."""
    if kind == 'FasterRCNN':
        model = faster_rcnn(3)
        model['train_cfg']['rpn']['sampler'] = dict(type='PseudoSampler')
        model['train_cfg']['rcnn']['sampler'] = dict(type='mmdet_lt.AllSampler')
        return model
    base = dict(retinanet(3), test_cfg=dict(TEST))
    if kind == 'RetinaNet':
        base['bbox_head']['loss_cls'] = BCE
        return base
    if kind == 'FCOS':
        return dict(_fcos(base), type='FCOS')
    return dict(_atss(base, f'{kind}Head'), type=kind)


def model_config(kind: str, **options: Any) -> ConfigDict:
    """Config of a toy detector of type SamplingFree; ``options`` are those of ``sampling_free``."""
    model = dict(plain_model(kind), type='mmdet_lt.SamplingFree', detector=kind)
    return ConfigDict(copy.deepcopy(dict(model, sampling_free=options)))


def build(kind: str, **options: Any):
    """A toy detector of type SamplingFree."""
    init_default_scope('mmdet')
    return MODELS.build(model_config(kind, **options))


def run_config(
    folder: Path, work_dir: Path, kind: str, hook: dict | None = None, epochs: int = 1, **options
) -> Config:
    """A run of a toy detector with OptimalBiasHook."""
    cfg = toy_config(folder, epochs=epochs)
    cfg.model = model_config(kind, **options)
    cfg.custom_hooks = [dict(type='mmdet_lt.OptimalBiasHook', **(hook or {}))]
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'{work_dir.name}-{len(list(work_dir.glob("*")))}-{id(cfg)}'
    return cfg


def train(cfg: Config) -> Runner:
    """Run a config to its end."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def batch(objects: int = 2) -> tuple[torch.Tensor, list[DetDataSample]]:
    """Two random images of 64 x 64 with the given number of objects each."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(2):
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(64, 64), pad_shape=(64, 64), batch_input_shape=(64, 64),
                ori_shape=(64, 64), scale_factor=(1.0, 1.0),
            )
        )  # fmt: skip
        corner = torch.rand(objects, 2, generator=generator) * 30
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([corner, corner + 25], 1), labels=torch.arange(objects) % 3
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return torch.randn(2, 3, 64, 64, generator=generator), samples
