"""Hand training statistics to metrics whose annotation files have no frequency groups."""

from __future__ import annotations

import os.path as osp
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.runner import BaseLoop, Runner


def metrics_without_statistics(runner: Runner) -> Iterator[Any]:
    """Metrics of the built validation and test loops that ask for statistics and have none."""
    for loop in (runner._val_loop, runner._test_loop):
        if isinstance(loop, BaseLoop):
            for metric in loop.evaluator.metrics:
                if getattr(metric, 'class_statistics', False) is None:
                    yield metric


def training_annotation_file(cfg: Mapping[str, Any]) -> str | None:
    """The annotation file below ``train_dataloader.dataset`` where it exists, else None.

    In a test run the training set is not built, but its file is enough to group classes.
    """
    dataset = (cfg.get('train_dataloader') or {}).get('dataset')
    while isinstance(dataset, Mapping) and isinstance(dataset.get('dataset'), Mapping):
        dataset = dataset['dataset']
    if not isinstance(dataset, Mapping) or not isinstance(dataset.get('ann_file'), str):
        return None
    path = osp.join(dataset.get('data_root') or '', dataset['ann_file'])
    return path if path.endswith('.json') and osp.isfile(path) else None
