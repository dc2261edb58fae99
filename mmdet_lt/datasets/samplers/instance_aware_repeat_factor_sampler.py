r"""Instance-aware repeat-factor sampling (IRFS).

Paper: Yaman, Mahmud, Liu, *Instance-Aware Repeat Factor Sampling for Long-Tailed Object Detection*,
2023, https://arxiv.org/abs/2305.08069.

.. math::
    f_c = \sqrt{f^{img}_c \, f^{inst}_c}, \qquad r_c = \max(1, \sqrt{t / f_c}), \qquad
    r_I = \max_{c \in I} r_c

``f_img`` is the fraction of annotated images that contain class ``c``, ``f_inst`` the fraction of
all boxes that are of class ``c``.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np

from mmdet_lt.datasets.samplers.repeat_factor_sampler import RepeatFactorSampler
from mmdet_lt.errors import InputError
from mmdet_lt.registry import DATA_SAMPLERS

_MEANS = {
    'geometric': lambda image, instance: np.sqrt(image * instance),
    'arithmetic': lambda image, instance: (image + instance) / 2,
    'quadratic': lambda image, instance: np.sqrt((image**2 + instance**2) / 2),
    'harmonic': lambda image, instance: np.divide(
        2 * image * instance, image + instance, out=np.zeros_like(image), where=image > 0
    ),
    'instance': lambda image, instance: instance,
}


@DATA_SAMPLERS.register_module()
class InstanceAwareRepeatFactorSampler(RepeatFactorSampler):
    """Repeat-factor sampling by images and boxes of a class together.

    An image holds several boxes, so ``f_inst`` is mostly the smaller frequency: at equal
    ``repeat_thr`` more classes are repeated, more often, and epochs are longer than with
    :class:`RepeatFactorSampler`. Compare the two at equal iterations.

    Args:
        dataset: Built data set, wrapped or not.
        repeat_thr: ``t``. LVIS: 1e-3.
        mean: How the two frequencies are combined: 'geometric' (the paper's choice), 'arithmetic',
            'harmonic', 'quadratic', or 'instance' for ``f_inst`` alone (the paper's ablation).
        seed: Same on every rank; by default drawn once and shared.
        shuffle: Random order, else data set order.
        class_statistics: See :class:`RepeatFactorSampler`.

    Raises:
        InputError: As :class:`RepeatFactorSampler`, or ``mean`` is unknown.
    """

    def __init__(
        self,
        dataset: Sized,
        repeat_thr: float = 1e-3,
        mean: str = 'geometric',
        seed: int | None = None,
        shuffle: bool = True,
        class_statistics: Any = None,
    ) -> None:
        if mean not in _MEANS:
            raise InputError(
                f'`train_dataloader.sampler.mean` must be one of {sorted(_MEANS)}, found {mean!r}.'
            )
        self.mean = mean
        super().__init__(dataset, repeat_thr, seed, shuffle, class_statistics)

    def _frequency(self, image_frequency: np.ndarray, instance_count: np.ndarray) -> np.ndarray:
        return _MEANS[self.mean](image_frequency, instance_count / instance_count.sum())

    def parameters(self) -> dict[str, Any]:
        """The arguments that decide the stream."""
        return dict(super().parameters(), mean=self.mean)
