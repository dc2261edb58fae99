r"""Square-root sampling: classes are drawn by the root of their number of images.

Paper: Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*,
ICLR 2020, https://arxiv.org/abs/1910.09217; first in Mahajan et al., ECCV 2018,
https://arxiv.org/abs/1805.00932.

.. math::
    p_c = \frac{\sqrt{n_c}}{\sum_k \sqrt{n_k}}, \qquad P(I) = \sum_{c \in I} \frac{p_c}{n_c}

``n_c`` images contain class ``c``, ``P(I)`` is the share of image ``I``.
"""

from __future__ import annotations

from collections.abc import Sized

import numpy as np

from mmdet_lt.datasets.samplers._class_draw import ClassDrawSampler
from mmdet_lt.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class SquareRootSampler(ClassDrawSampler):
    """Draw a class by the root of its number of images, then one of its images uniformly.

    Half-way between :class:`ClassBalancedSampler` (exponent 0) and drawing classes as often as they
    occur (exponent 1). An epoch has as many draws as the data set has images. Images without boxes
    are not drawn.

    Args:
        dataset: Built data set, wrapped or not.
        seed: Same on every rank; by default drawn once and shared.
        shuffle: Random order, else data set order.
        max_repeats: Cap on the expected draws of one image in an epoch; what is above goes to the
            other images in proportion to their own.

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
        super().__init__(dataset, seed, shuffle, max_repeats)
        self._expected = self._draws_of(0.5)

    def _expected_draws(self, epoch: int) -> np.ndarray:
        return self._expected
