"""Look at the data files a config names before anything is built or written."""

from __future__ import annotations

import os.path as osp
from collections.abc import Iterator, Mapping
from typing import Any

from mmdet_lt.errors import InputError
from mmdet_lt.evaluation.ground_truth import check_annotation_file


def dataset_configs(config: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(config key, dict) of every data set with an annotation file, below any wrapper."""
    if isinstance(config, (list, tuple)):
        for index, part in enumerate(config):
            yield from dataset_configs(part, f'{key}[{index}]')
    elif isinstance(config, Mapping):
        if isinstance(config.get('ann_file'), str):
            yield key, config
        for name in ('dataset', 'datasets'):
            if name in config:
                yield from dataset_configs(config[name], f'{key}.{name}')


def check_data_files(cfg: Mapping[str, Any], splits: tuple[str, ...]) -> None:
    """Check that local JSON annotation files exist and are not cut off.

    Args:
        cfg: The config.
        splits: Of 'train', 'val' and 'test', those that will be used.

    Raises:
        InputError: With the file and the config key.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        found = list(dataset_configs(loader.get('dataset'), f'{split}_dataloader.dataset'))
        found += dataset_configs(cfg.get(f'{split}_evaluator'), f'{split}_evaluator')
        for key, config in found:
            path = config['ann_file']
            remote = (config.get('backend_args') or {}).get('backend', 'local') != 'local'
            if not path or remote or '://' in path or not path.endswith('.json'):
                continue
            if not osp.isabs(path):
                path = osp.join(config.get('data_root') or '', path)
            if not osp.isfile(path):
                raise InputError(
                    f'annotation file {path} expected, found nothing there: correct '
                    f'`{key}.ann_file` or `data_root`.'
                )
            check_annotation_file(path)
