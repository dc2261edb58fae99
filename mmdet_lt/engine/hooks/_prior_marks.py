"""Fingerprints of what a measured prior depends on; none of them contains a path."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict
from torch import nn

from mmdet_lt.datasets.records import _all_records, unwrap_datasets
from mmdet_lt.models.layers.prior_state import MARK_LENGTH
from mmdet_lt.utils.files import file_digest

#: Parts of a model config that decide which rows a loss receives; backbone and neck by the size of
#: their features and the proposals that come of them.
_MODEL_KEYS = (
    'detector',
    'data_preprocessor',
    'backbone',
    'neck',
    'bbox_head',
    'rpn_head',
    'roi_head',
    'train_cfg',
)
#: Settings that leave the rows as they are.
_NO_ROWS = {
    'test_cfg',
    'init_cfg',
    'pretrained',
    'chunk_size',
    'with_cp',
    'frozen_stages',
    'norm_eval',
}


def data_mark(dataset: Any, loader_config: Any) -> list[int]:
    """Fingerprint of boxes, labels, annotation files and training pipelines.

    Without a config of the loader the transforms' own descriptions stand in for it.
    """
    digest = hashlib.blake2b(digest_size=8 * MARK_LENGTH)
    digest.update(str(len(dataset)).encode())
    leaves = unwrap_datasets(dataset)
    for leaf in leaves:
        for record in _all_records(leaf):
            digest.update(_text(_record(record)).encode())
        path = getattr(leaf, 'ann_file', None)
        if isinstance(path, str) and os.path.isfile(path):
            digest.update(file_digest(path).encode())
    pipelines = list(_pipelines(_plain(loader_config)))
    if not pipelines:
        pipelines = [_transforms(leaf) for leaf in leaves]
    digest.update(_text(pipelines).encode())
    return _numbers(digest)


def detector_mark(model_config: Any, model: nn.Module) -> list[int]:
    """Fingerprint of detector, assigners and samplers; losses and initialisation do not count.

    Without a config of the model its modules and their training settings stand in for it.
    """
    digest = hashlib.blake2b(digest_size=8 * MARK_LENGTH)
    config = _plain(model_config)
    if isinstance(config, Mapping):
        config = {key: _rows_only(config.get(key)) for key in _MODEL_KEYS}
    else:
        config = [
            repr(model),
            *(str(getattr(part, 'train_cfg', '')) for part in model.modules()),
            *(repr(getattr(part, 'prior_generator', '')) for part in model.modules()),
        ]
    digest.update(_text(config).encode())
    return _numbers(digest)


def combined_mark(marks: Mapping[str, Sequence[int]], *details: Any) -> str:
    """Name of a cache entry: marks, and details of the measurement that results may depend on."""
    text = _text([marks, *details])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def weights_mark(path: Any) -> str | None:
    """Fingerprint of the weights training starts from, on which proposals depend."""
    if path is None:
        return None
    return file_digest(path) if os.path.isfile(path) else str(path)


def _record(record: Mapping[str, Any]) -> list[Any]:
    """What decides about rows: size of the image, boxes, labels and crowds."""
    return [
        record.get('height'),
        record.get('width'),
        [
            [one.get('bbox'), one.get('bbox_label'), one.get('ignore_flag', 0)]
            for one in record.get('instances', [])
        ],
    ]


def _transforms(dataset: Any) -> list[str]:
    """Descriptions of the transforms of a data set; an address in one would make it useless."""
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', ())
    return [re.sub(r' at 0x[0-9a-f]+', '', repr(step)) for step in steps]


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
            if not str(key).startswith('loss_') and key not in _NO_ROWS
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
