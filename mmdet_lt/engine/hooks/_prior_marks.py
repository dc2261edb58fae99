"""Fingerprints of what a measured prior depends on; none of them contains a path."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

from mmdet_lt.datasets.records import dataset_labels, unwrap_datasets
from mmdet_lt.models.layers.prior_state import MARK_LENGTH
from mmdet_lt.utils.files import file_digest

#: Parts of a model config that decide which rows a loss receives.
_MODEL_KEYS = ('detector', 'data_preprocessor', 'bbox_head', 'rpn_head', 'roi_head', 'train_cfg')


def data_mark(dataset: Any, loader_config: Any) -> list[int]:
    """Fingerprint of labels, annotation files and training pipelines."""
    digest = hashlib.blake2b(digest_size=8 * MARK_LENGTH)
    digest.update(str(len(dataset)).encode())
    for leaf in unwrap_datasets(dataset):
        for column in dataset_labels(leaf):
            digest.update(column.tobytes())
        path = getattr(leaf, 'ann_file', None)
        if isinstance(path, str) and os.path.isfile(path):
            digest.update(file_digest(path).encode())
    digest.update(_text(list(_pipelines(_plain(loader_config)))).encode())
    return _numbers(digest)


def detector_mark(model_config: Any) -> list[int]:
    """Fingerprint of heads, assigners and samplers; losses and initialisation do not count."""
    digest = hashlib.blake2b(digest_size=8 * MARK_LENGTH)
    config = _plain(model_config)
    if isinstance(config, Mapping):
        config = {key: _rows_only(config.get(key)) for key in _MODEL_KEYS}
    digest.update(_text(config).encode())
    return _numbers(digest)


def combined_mark(marks: Mapping[str, Sequence[int]], num_images: int | None) -> str:
    """Name of a cache entry."""
    text = _text([marks, num_images])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _numbers(digest: Any) -> list[int]:
    raw = digest.digest()
    return [
        int.from_bytes(raw[start : start + 8], 'little', signed=True)
        for start in range(0, len(raw), 8)
    ]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _plain(config: Any) -> Any:
    if isinstance(config, (Config, ConfigDict)):
        return config.to_dict()
    return config


def _rows_only(config: Any) -> Any:
    """A part of a model config without what leaves the rows as they are."""
    if isinstance(config, Mapping):
        return {
            key: _rows_only(value)
            for key, value in config.items()
            if not key.startswith('loss_') and key not in ('test_cfg', 'init_cfg', 'chunk_size')
        }
    if isinstance(config, (list, tuple)):
        return [_rows_only(value) for value in config]
    return config


def _pipelines(config: Any) -> Iterator[Any]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            if key == 'pipeline':
                yield value
            else:
                yield from _pipelines(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _pipelines(value)
