"""Class counts in the form in which the losses use them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.statistics import ClassStatistics

COUNTS = ('image', 'instance')


def check_count(name: str, count: str) -> str:
    """``count`` unless it is no column of the statistics; ``name`` is that of the loss."""
    if count not in COUNTS:
        raise InputError(f'`loss_cls.count` of {name} must be one of {COUNTS}, found {count!r}.')
    return count


def class_count(stats: ClassStatistics, count: str) -> Tensor:
    """``n_c``, float64 (C,): images or boxes of each class; absent classes count as 1."""
    values = stats.image_count if count == 'image' else stats.instance_count
    return torch.from_numpy(np.maximum(values, 1).astype(np.float64))
