"""Which category of the annotation file each label of the model means, and its frequency group."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from mmengine.logging import print_log

from mmdet_lt.errors import InputError
from mmdet_lt.evaluation.ground_truth import GroundTruth
from mmdet_lt.statistics import ClassStatistics
from mmdet_lt.utils.names import canonical_name


def class_names(dataset_meta: dict | None) -> tuple[str, ...] | None:
    """Names in label order from a data set's meta information, or None."""
    classes = (dataset_meta or {}).get('classes')
    if classes is None:
        return None
    return (classes,) if isinstance(classes, str) else tuple(str(name) for name in classes)


def label_categories(classes: Sequence[str] | None, truth: GroundTruth, source: str) -> np.ndarray:
    """Category index of each label, int64 (C,), found by name.

    Without ``classes`` label ``i`` is the category with the ``i``-th smallest id.

    Raises:
        InputError: A class is not in the file, or a name occurs twice.
    """
    if classes is None:
        _warn('LVISMetric knows no class names: label i is taken as the i-th category id.')
        return np.arange(len(truth.names))
    index = {canonical_name(name): k for k, name in enumerate(truth.names)}
    own = [canonical_name(name) for name in classes]
    if len(set(own)) != len(own):
        twice = next(name for name in own if own.count(name) > 1)
        raise InputError(f'class name {twice!r} occurs twice in `metainfo.classes`: rename one.')
    for label, name in enumerate(own):
        if name in index:
            continue
        found = ''
        if len(own) == len(truth.names):
            found = f', whose category at that place is {truth.names[label]!r}'
        raise InputError(
            f'class {label} of the data set is {classes[label]!r}, which is none of the '
            f'{len(truth.names)} categories of {source}{found} (the model has {len(own)} classes): '
            'correct `metainfo.classes` or `ann_file`.'
        )
    left_out = len(truth.names) - len(own)
    if left_out:
        _warn(
            f'{left_out} of the {len(truth.names)} categories of {source} are not classes of the '
            'model; they are left out of the evaluation.'
        )
    return np.array([index[name] for name in own], dtype=np.int64)


def category_groups(
    truth: GroundTruth, categories: np.ndarray, statistics: ClassStatistics | None
) -> tuple[np.ndarray, np.ndarray]:
    """Frequency group and training counts of the evaluated categories.

    The annotation file's ``frequency`` wins, so that LVIS results are the official ones; where it
    has none, the training statistics decide.

    Returns:
        Groups 'r', 'c', 'f' or '' (unknown), (K,), and ``image_count`` and ``instance_count`` of
        the training set, int64 (K, 2), -1 where unknown.

    Raises:
        InputError: The statistics do not know a class.
    """
    groups, counts = truth.frequency[categories].copy(), truth.train_counts[categories].copy()
    if statistics is not None:
        known = {canonical_name(name): i for i, name in enumerate(statistics.classes)}
        names = [truth.names[k] for k in categories]
        missing = [name for name in names if canonical_name(name) not in known]
        if missing:
            raise InputError(
                f'`class_statistics` ({statistics.num_classes} classes) are of another data set: '
                f'{len(missing)} of the {len(names)} evaluated classes, such as {missing[0]!r}, '
                'are not in them; give those of the training set.'
            )
        rows = np.array([known[canonical_name(name)] for name in names], dtype=np.int64)
        groups = np.where(groups == '', statistics.groups[rows], groups)
        counts = np.stack([statistics.image_count, statistics.instance_count], axis=1)[rows]
    unknown = int((groups == '').sum())
    if unknown:
        _warn(
            f'{unknown} of {len(groups)} classes have no frequency group and count in none of APr, '
            'APc and APf: give the training annotation file as `class_statistics`.'
        )
    return groups, counts


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)
