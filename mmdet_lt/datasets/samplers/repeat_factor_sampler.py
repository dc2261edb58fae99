r"""Repeat-factor sampling (RFS).

Paper: Gupta, Dollár, Girshick, *LVIS: A Dataset for Large Vocabulary Instance Segmentation*,
CVPR 2019, https://arxiv.org/abs/1908.03195.

.. math::
    r_c = \max(1, \sqrt{t / f_c}), \qquad r_I = \max_{c \in I} r_c

``f_c`` is the fraction of annotated images that contain class ``c``, ``t`` is ``repeat_thr``. In
each epoch image ``I`` is drawn ``floor(r_I)`` times and once more with probability
``r_I - floor(r_I)``; images without boxes have factor 1.

Differs from MMEngine's ``ClassBalancedDataset``, which rounds every factor up once and for all:
there a set with mean factor 1.04 grows to 1.25.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from mmdet_lt.datasets.records import indexed_labels, unwrap_datasets
from mmdet_lt.errors import InputError
from mmdet_lt.registry import DATA_SAMPLERS


def class_repeat_factors(image_frequency: np.ndarray, repeat_thr: float) -> np.ndarray:
    """``r_c = max(1, sqrt(t / f_c))``, float64 (C,); classes without images get 1."""
    present = image_frequency > 0
    ratio = np.divide(repeat_thr, image_frequency, out=np.ones(len(present)), where=present)
    return np.maximum(1.0, np.sqrt(ratio))


def image_repeat_factors(
    index: np.ndarray, label: np.ndarray, num_images: int, class_factors: np.ndarray
) -> np.ndarray:
    """``r_I = max_{c in I} r_c``, float64 (num_images,).

    Args:
        index: Image of each box, int64 (M,).
        label: Class of each box, int64 (M,).
        num_images: Images in all.
        class_factors: ``r_c``, (C,).
    """
    factors = np.ones(num_images)
    np.maximum.at(factors, index, class_factors[label])
    return factors


def draw_repeats(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round each factor up or down at random with the right mean; the total stays within one.

    Systematic sampling: with one uniform offset ``u``, image ``k`` of a random order gets
    ``floor(S_k + u) - floor(S_{k-1} + u)`` draws, ``S`` the cumulative sum. Each image has the same
    distribution as under independent rounding (``floor`` plus a coin of the fraction), but the
    length of the epoch is constant, which learning-rate schedules need.

    Returns:
        Draws of each image, int64, summing to ``floor(sum)`` or ``ceil(sum)``.
    """
    order = rng.permutation(len(factors))
    edges = np.floor(np.cumsum(factors[order]) + rng.random()).astype(np.int64)
    repeats = np.empty(len(factors), dtype=np.int64)
    repeats[order] = np.diff(edges, prepend=0)
    return repeats


@DATA_SAMPLERS.register_module()
class RepeatFactorSampler(Sampler):
    """Repeat-factor sampling with stochastic rounding, for epoch and iteration loops.

    Every rank computes the same list from ``(seed, epoch)`` and takes its own slice of it. Epochs
    have the constant length ``ceil(sum_I r_I / W)`` per rank, ``W`` ranks.

    Args:
        dataset: Built data set, wrapped or not.
        repeat_thr: ``t``; classes in fewer than this fraction of images are repeated. LVIS: 1e-3.
        seed: Same on every rank; by default drawn once and shared.
        shuffle: Random order, else data set order.

    Raises:
        InputError: ``repeat_thr`` is not positive, or the data set is empty.
    """

    def __init__(
        self,
        dataset: Sized,
        repeat_thr: float = 1e-3,
        seed: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if not 0 < repeat_thr <= 1:
            raise InputError(
                '`train_dataloader.sampler.repeat_thr` is a fraction of images in (0, 1], found '
                f'{repeat_thr}.'
            )
        if len(dataset) == 0:
            raise InputError(
                'RepeatFactorSampler got an empty data set: check `ann_file`, `data_prefix` and '
                '`filter_cfg` of `train_dataloader.dataset`.'
            )
        _warn_if_stacked(dataset)
        self.rank, self.world_size = get_dist_info()
        self.dataset = dataset
        self.repeat_thr = repeat_thr
        self.seed = sync_random_seed() if seed is None else seed
        self.shuffle = shuffle
        self.epoch = 0
        self.class_factors, self.factors = self._compute()
        self.num_samples = math.ceil(self.factors.sum() / self.world_size)
        self.total_size = self.num_samples * self.world_size

    def _compute(self) -> tuple[np.ndarray, np.ndarray]:
        index, label = indexed_labels(self.dataset)
        num_classes = max(_num_classes(self.dataset), int(label.max(initial=-1)) + 1)
        pairs = np.unique(index * num_classes + label)
        annotated = len(np.unique(index))
        image_count = np.bincount(pairs % max(num_classes, 1), minlength=num_classes)
        by_class = class_repeat_factors(image_count / max(annotated, 1), self.repeat_thr)
        return by_class, image_repeat_factors(index, label, len(self.dataset), by_class)

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """The list all ranks share in one epoch, int64 (total_size,)."""
        rng = np.random.default_rng([self.seed, epoch])
        indices = np.repeat(np.arange(len(self.factors)), draw_repeats(self.factors, rng))
        if self.shuffle:
            indices = rng.permutation(indices)
        # At most `world_size` entries are missing to a full list; they come from its start.
        return np.resize(indices, self.total_size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.epoch_indices(self.epoch)[self.rank :: self.world_size].tolist())

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; called by MMEngine before each one."""
        self.epoch = epoch


def _num_classes(dataset: Any) -> int:
    return len(unwrap_datasets(dataset)[0].metainfo.get('classes', ()))


def _warn_if_stacked(dataset: Any) -> None:
    from mmengine.dataset import ClassBalancedDataset

    while dataset is not None:
        if isinstance(dataset, ClassBalancedDataset):
            warnings.warn(
                'RepeatFactorSampler on top of ClassBalancedDataset re-balances twice: use the '
                'inner data set in `train_dataloader.dataset`.',
                stacklevel=3,
            )
        dataset = dataset.__dict__.get('dataset')
