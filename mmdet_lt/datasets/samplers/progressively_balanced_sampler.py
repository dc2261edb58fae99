r"""Progressively-balanced sampling: from instance-balanced to class-balanced.

Paper: Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*,
ICLR 2020, https://arxiv.org/abs/1910.09217.

.. math::
    p_c(t) = (1 - t / T) \frac{n_c}{\sum_k n_k} + \frac{t}{T} \frac{1}{C'}, \qquad
    P(I) = \sum_{c \in I} \frac{p_c(t)}{n_c}

``n_c`` images contain class ``c``, ``C'`` classes have images. The number of images stands for the
number of samples of a class, since an image is what is drawn.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np

from mmdet_lt.datasets.samplers._class_draw import ClassDrawSampler
from mmdet_lt.datasets.samplers._draws import draw_list
from mmdet_lt.errors import InputError
from mmdet_lt.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class ProgressivelyBalancedSampler(ClassDrawSampler):
    """Each draw is class-balanced with probability ``t / T``, else instance-balanced.

    Epochs count from 1 in ``t``, as in the reference code: the last of ``max_epochs`` is fully
    class-balanced. With ``max_samples`` ``t`` is the number of images drawn so far, which changes
    within an epoch. After ``T`` sampling stays class-balanced. Under deferral ``t`` counts from the
    start of training, so the re-balanced stage begins nearly class-balanced.

    An epoch has as many draws as the data set has images. Images without boxes are not drawn.

    Args:
        dataset: Built data set, wrapped or not.
        max_epochs: ``T`` for epoch loops: `train_cfg.max_epochs`.
        max_samples: ``T`` for iteration loops: images that all ranks draw in the whole training,
            iterations x batch size x ranks.
        seed: Same on every rank; by default drawn once and shared.
        shuffle: Random order, else data set order (each of the two parts of an epoch by itself).
        max_repeats: Cap on the expected draws of one image in an epoch, applied to each of the two
            distributions; what is above goes to the other images in proportion to their own.

    Raises:
        InputError: Not exactly one of ``max_epochs`` and ``max_samples`` is given, or it is not
            positive; the data set is empty, has no box or is re-balanced already; ``max_repeats``
            is too small to fill an epoch.
    """

    def __init__(
        self,
        dataset: Sized,
        max_epochs: int | None = None,
        max_samples: int | None = None,
        seed: int | None = None,
        shuffle: bool = True,
        max_repeats: float | None = None,
    ) -> None:
        given = [value for value in (max_epochs, max_samples) if value is not None]
        if len(given) != 1 or given[0] <= 0:
            raise InputError(
                'ProgressivelyBalancedSampler needs one positive number, `max_epochs` (epoch '
                'loops) or `max_samples` (iterations x batch size x ranks), in '
                f'`train_dataloader.sampler`, found max_epochs={max_epochs}, '
                f'max_samples={max_samples}.'
            )
        super().__init__(dataset, seed, shuffle, max_repeats)
        self.max_epochs, self.max_samples = max_epochs, max_samples
        self._instance_balanced = self._draws_of(1.0)
        self._class_balanced = self._draws_of(0.0)

    def progress(self, epoch: int) -> np.ndarray:
        """``t / T`` of each draw of an epoch, float64 (epoch_size,), at most 1."""
        if self.max_epochs is not None:
            done = np.full(self.epoch_size, (epoch + 1) / self.max_epochs)
        else:
            done = (epoch * self.epoch_size + np.arange(1, self.epoch_size + 1)) / self.max_samples
        return np.minimum(done, 1.0)

    def _expected_draws(self, epoch: int) -> np.ndarray:
        done = self.progress(epoch).mean()
        return (1 - done) * self._instance_balanced + done * self._class_balanced

    def _draw(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        # A coin for each position between two complete lists: the mixture is exact at each draw.
        size = self.epoch_size
        plain = np.resize(draw_list(self._instance_balanced, rng, self.shuffle), size)
        balanced = np.resize(draw_list(self._class_balanced, rng, self.shuffle), size)
        return np.where(rng.random(size) < self.progress(epoch), balanced, plain)

    def parameters(self) -> dict[str, Any]:
        """The arguments that decide the stream."""
        own = dict(max_epochs=self.max_epochs, max_samples=self.max_samples)
        return dict(super().parameters(), **own)
