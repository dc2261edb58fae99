"""A toy detection task: coloured rectangles in COCO format and detectors that train in seconds.

Used by tests that need MMDetection's real Runner from end to end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from toy_models import MODELS

# One colour (BGR) per class, far apart, so that a tiny network can tell them apart.
_COLOURS = [
    (40, 40, 220),
    (40, 220, 40),
    (220, 40, 40),
    (40, 220, 220),
    (220, 40, 220),
    (220, 220, 40),
    (240, 240, 240),
    (30, 120, 240),
]


def class_names(num_classes: int = 3) -> tuple[str, ...]:
    """Names of the toy classes in label order."""
    return tuple(f'class_{index}' for index in range(num_classes))


def make_toy_coco(
    folder: str | Path,
    num_images: int = 8,
    num_classes: int = 3,
    size: int = 64,
    boxes_per_image: int = 2,
    seed: int = 0,
    name: str = 'train',
) -> Path:
    """Write images with one rectangle per object and their COCO annotation file.

    Objects take the classes in turn, so every class occurs as soon as there are enough objects.

    Args:
        folder: Where ``<name>/*.png`` and ``<name>.json`` go.
        num_images: Number of images.
        num_classes: Number of classes, at most 8; category ids count from 1.
        size: Height and width of the images in pixels.
        boxes_per_image: Objects per image.
        seed: Seed of positions and background noise.
        name: Name of the split.

    Returns:
        The annotation file.
    """
    folder = Path(folder)
    (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        canvas = rng.integers(90, 130, (size, size, 3), dtype=np.uint8)
        for _ in range(boxes_per_image):
            label = len(annotations) % num_classes
            width, height = (int(v) for v in rng.integers(size // 4, size // 2, 2))
            left, top = int(rng.integers(0, size - width)), int(rng.integers(0, size - height))
            canvas[top : top + height, left : left + width] = _COLOURS[label]
            right, bottom = left + width, top + height
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=label + 1,
                    bbox=[left, top, width, height],
                    area=width * height,
                    iscrowd=0,
                    segmentation=[[left, top, right, top, right, bottom, left, bottom]],
                )
            )
        file_name = f'{image_id:04d}.png'
        cv2.imwrite(str(folder / name / file_name), canvas)
        images.append(dict(id=image_id, file_name=file_name, height=size, width=size))
    categories = [
        dict(id=index + 1, name=class_name, supercategory='toy')
        for index, class_name in enumerate(class_names(num_classes))
    ]
    path = folder / f'{name}.json'
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return path


def toy_config(
    folder: str | Path,
    model: str = 'retinanet',
    num_classes: int = 3,
    epochs: int = 1,
    batch_size: int = 2,
    size: int = 64,
    overrides: dict[str, Any] | None = None,
) -> Config:
    """Config that trains and tests a toy detector on the split ``train`` in ``folder``.

    Data order and start weights are fixed by a seed and the pipeline has no random step, so equal
    runs give equal losses. Validation is off during training.

    Args:
        folder: Folder given to :func:`make_toy_coco`.
        model: ``'retinanet'`` or ``'faster_rcnn'``.
        num_classes: Number of classes.
        epochs: Training epochs.
        batch_size: Images per batch.
        size: Image size.
        overrides: Dotted keys and their values, merged last.
    """
    detector = MODELS[model](num_classes)
    cfg = Config(
        dict(
            default_scope='mmdet',
            **_runtime(epochs),
            **_data(Path(folder), num_classes, batch_size, size),
            model=detector,
            optim_wrapper=dict(
                type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9)
            ),
            param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4)],
        )
    )
    cfg.merge_from_dict(overrides or {})
    return cfg


def toy_config_text(folder: str | Path, model: str = 'retinanet', **options: Any) -> str:
    """Source text of :func:`toy_config`; takes the same options."""
    return toy_config(folder, model, **options).pretty_text


def write_toy_config(
    path: str | Path, folder: str | Path, model: str = 'retinanet', extra: str = '', **options: Any
) -> Path:
    """Write the text of :func:`toy_config`, followed by ``extra`` Python lines, to ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{toy_config_text(folder, model, **options)}\n{extra}')
    return path


def _runtime(epochs: int) -> dict[str, Any]:
    return dict(
        default_hooks=dict(
            timer=dict(type='IterTimerHook'),
            logger=dict(type='LoggerHook', interval=1),
            param_scheduler=dict(type='ParamSchedulerHook'),
            checkpoint=dict(type='CheckpointHook', interval=1),
            sampler_seed=dict(type='DistSamplerSeedHook'),
            visualization=dict(type='DetVisualizationHook'),
        ),
        env_cfg=dict(
            cudnn_benchmark=False,
            mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
            dist_cfg=dict(backend='nccl'),
        ),
        visualizer=dict(
            type='DetLocalVisualizer',
            vis_backends=[dict(type='LocalVisBackend')],
            name='visualizer',
        ),
        log_processor=dict(type='LogProcessor', window_size=1, by_epoch=True),
        log_level='INFO',
        randomness=dict(seed=0),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1000),
        test_cfg=dict(type='TestLoop'),
    )


def _data(folder: Path, num_classes: int, batch_size: int, size: int) -> dict[str, Any]:
    load = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True),
        dict(type='Resize', scale=(size, size), keep_ratio=True),
    ]
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    dataset = dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=class_names(num_classes)),
        pipeline=[*load, dict(type='PackDetInputs', meta_keys=keys)],
    )
    loader = dict(batch_size=batch_size, num_workers=0, dataset=dataset)
    return dict(
        train_dataloader=dict(
            **loader,
            sampler=dict(type='DefaultSampler', shuffle=True),
        ),
        test_dataloader=dict(
            **dict(loader, dataset=dict(dataset, test_mode=True)),
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        test_evaluator=dict(type='CocoMetric', ann_file=str(folder / 'train.json'), metric='bbox'),
    )
