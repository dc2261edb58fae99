"""Predict a few images that hold rare classes, for the pictures of the report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint

from mmdet_lt.statistics import ClassStatistics
from mmdet_lt.utils.files import write_text_atomic


def write_examples(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    statistics: ClassStatistics,
    num: int = 12,
    score_thr: float = 0.3,
    device: str = 'cpu',
) -> None:
    """Write ``examples.json``: true and predicted boxes of images with rare objects.

    Args:
        config: Config of the trained detector; its ``val_dataloader.dataset`` is used.
        checkpoint: Weights.
        out: File to write.
        statistics: Training statistics; tell which classes are rare.
        num: Images, those with most rare objects first, data set order breaking ties.
        score_thr: Lowest score of a drawn prediction.
        device: Where to run the detector.
    """
    from mmdet.registry import DATASETS, MODELS

    cfg = Config.fromfile(str(config))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    classes = dataset.metainfo['classes']
    groups = statistics.align(classes).groups
    model = MODELS.build(cfg.model)
    load_checkpoint(model, str(checkpoint), map_location='cpu', logger='silent')
    model = model.to(device).eval()

    def rare_objects(index: int) -> int:
        instances = dataset.get_data_info(index)['instances']
        return sum(groups[instance['bbox_label']] == 'r' for instance in instances)

    order = sorted(range(len(dataset)), key=rare_objects, reverse=True)[:num]
    examples = []
    for index in order:
        info = dataset.get_data_info(index)
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([dataset[index]]))[0]
        found = sample.pred_instances[sample.pred_instances.scores >= score_thr].cpu()
        examples.append(
            dict(
                image=str(Path(info['img_path']).resolve()),
                gt=[_box(i['bbox'], i['bbox_label'], classes, groups) for i in info['instances']],
                pred=[
                    dict(_box(box, label, classes, groups), score=score)
                    for box, label, score in zip(
                        found.bboxes.tolist(),
                        found.labels.tolist(),
                        found.scores.tolist(),
                        strict=True,
                    )
                ],
            )
        )
    write_text_atomic(out, json.dumps(examples))


def _box(bbox: Any, label: int, classes: Any, groups: Any) -> dict[str, Any]:
    return dict(bbox=list(bbox), label=classes[label], group=str(groups[label]))
