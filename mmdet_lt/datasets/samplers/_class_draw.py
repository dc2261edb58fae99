r"""Draw a class first, then an image that contains it.

.. math::
    P(I) = \sum_{c \in I} \frac{p_c}{n_c}

``n_c`` images contain class ``c``, ``p_c`` is the probability of the class. In one epoch of ``n``
draws (``n`` images) image ``I`` is expected ``n P(I)`` times; it is drawn that number of times
rounded up or down at random, with the right mean. So the shares are those of independent draws of
a class and an image, without their noise.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np

from mmdet_lt.datasets.samplers._draws import cap_draws
from mmdet_lt.datasets.samplers.base import RebalancingSampler
from mmdet_lt.errors import InputError


class ClassDrawSampler(RebalancingSampler):
    """Common base of the samplers that draw a class first. An epoch has ``n`` draws.

    Images without boxes are not drawn. An image with several classes can be drawn for each of them.

    Args:
        dataset: Built data set, wrapped or not.
        seed: Same on every rank; by default drawn once and shared.
        shuffle: Random order, else data set order.
        max_repeats: Cap on the expected draws of one image in an epoch; what is above goes to the
            other images in proportion to their own. Without it the only image of a class is drawn
            about ``n / C`` times when classes are balanced.

    Raises:
        InputError: The data set is empty, has no box or is re-balanced already, or ``max_repeats``
            is too small to fill an epoch.
    """

    def __init__(
        self,
        dataset: Sized,
        seed: int | None = None,
        shuffle: bool = True,
        max_repeats: float | None = None,
    ) -> None:
        super().__init__(dataset, seed, shuffle)
        if max_repeats is not None and not max_repeats > 0:
            raise InputError(
                '`train_dataloader.sampler.max_repeats` must be a positive number or None, found '
                f'{max_repeats}.'
            )
        self.max_repeats = max_repeats
        self._set_length(len(dataset))

    def class_probabilities(self, exponent: float) -> np.ndarray:
        """``p_c = n_c^q / sum_k n_k^q`` over the classes that have images, float64 (C,)."""
        count = self.contents.image_count
        weight = np.where(count > 0, np.maximum(count, 1.0) ** exponent, 0.0)
        return weight / weight.sum()

    def _draws_of(self, exponent: float) -> np.ndarray:
        """Expected draws of each image in an epoch for one exponent, float64 (n,)."""
        found = self.contents
        each = self.class_probabilities(exponent) / np.maximum(found.image_count, 1)
        shares = np.bincount(found.image, each[found.label], found.num_images)
        return cap_draws(shares * self.epoch_size, self.max_repeats)

    def parameters(self) -> dict[str, Any]:
        """The arguments that decide the stream."""
        return dict(super().parameters(), max_repeats=self.max_repeats)
