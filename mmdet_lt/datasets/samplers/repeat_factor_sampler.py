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

from collections.abc import Sized
from typing import Any

import numpy as np

from mmdet_lt.datasets.samplers._labels import given_statistics
from mmdet_lt.datasets.samplers.base import RebalancingSampler
from mmdet_lt.errors import InputError
from mmdet_lt.registry import DATA_SAMPLERS


def class_repeat_factors(frequency: np.ndarray, repeat_thr: float) -> np.ndarray:
    """``r_c = max(1, sqrt(t / f_c))``, float64 (C,); classes that do not occur get 1."""
    present = frequency > 0
    ratio = np.divide(repeat_thr, frequency, out=np.ones(len(present)), where=present)
    return np.maximum(1.0, np.sqrt(ratio))


def image_repeat_factors(
    index: np.ndarray, label: np.ndarray, num_images: int, class_factors: np.ndarray
) -> np.ndarray:
    """``r_I = max_{c in I} r_c``, float64 (num_images,).

    Args:
        index: Image of each box or (image, class) pair, int64 (M,).
        label: Class of each, int64 (M,).
        num_images: Images in all.
        class_factors: ``r_c``, (C,).
    """
    factors = np.ones(num_images)
    np.maximum.at(factors, index, class_factors[label])
    return factors


@DATA_SAMPLERS.register_module()
class RepeatFactorSampler(RebalancingSampler):
    """Repeat-factor sampling with stochastic rounding, for epoch and iteration loops.

    Every rank computes the same list from ``(seed, epoch)`` and takes its own slice of it. Epochs
    have the constant length ``ceil(sum_I r_I / W)`` per rank, ``W`` ranks.

    Args:
        dataset: Built data set, wrapped or not.
        repeat_thr: ``t``; classes in fewer than this fraction of images are repeated. LVIS: 1e-3.
        seed: Same on every rank; by default drawn once and shared.
        shuffle: Random order, else data set order.
        class_statistics: Annotation file, statistics file or dict whose counts give ``f_c``, for
            training on a part of a set with the factors of the whole. By default the counts of the
            data set itself.

    Raises:
        InputError: ``repeat_thr`` is not in (0, 1], the data set is empty, has no box or is
            re-balanced already, or ``class_statistics`` are of another data set.
    """

    def __init__(
        self,
        dataset: Sized,
        repeat_thr: float = 1e-3,
        seed: int | None = None,
        shuffle: bool = True,
        class_statistics: Any = None,
    ) -> None:
        if not 0 < repeat_thr <= 1:
            raise InputError(
                '`train_dataloader.sampler.repeat_thr` is a fraction of images in (0, 1], found '
                f'{repeat_thr}.'
            )
        super().__init__(dataset, seed, shuffle)
        self.repeat_thr = repeat_thr
        found = self.contents
        image_count, instance_count = found.image_count, found.instance_count
        annotated = int(found.annotated.sum())
        if class_statistics is not None:
            stats = given_statistics(class_statistics, dataset, found)
            image_count, instance_count = stats.image_count, stats.instance_count
            annotated = stats.num_annotated_images
        self.class_factors = class_repeat_factors(
            self._frequency(image_count / annotated, instance_count), repeat_thr
        )
        self.factors = image_repeat_factors(
            found.image, found.label, found.num_images, self.class_factors
        )
        self._set_length(self.factors.sum())

    def _frequency(self, image_frequency: np.ndarray, instance_count: np.ndarray) -> np.ndarray:
        """``f_c`` that enters the factors, float64 (C,); 0 for classes that do not occur."""
        return image_frequency

    def _expected_draws(self, epoch: int) -> np.ndarray:
        return self.factors

    def parameters(self) -> dict[str, Any]:
        """The arguments that decide the stream."""
        return dict(super().parameters(), repeat_thr=self.repeat_thr)
