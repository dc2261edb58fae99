r"""Class-balanced sampling: every class is drawn equally often.

Paper: Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*,
ICLR 2020, https://arxiv.org/abs/1910.09217.

.. math::
    p_c = \frac{1}{C'}, \qquad P(I) = \sum_{c \in I} \frac{p_c}{n_c}

``C'`` classes have images, ``n_c`` images contain class ``c``, ``P(I)`` is the share of image
``I``.
"""

from __future__ import annotations

from collections.abc import Sized

import numpy as np

from mmdet_lt.datasets.samplers._class_draw import ClassDrawSampler
from mmdet_lt.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class ClassBalancedSampler(ClassDrawSampler):
    """Draw a class uniformly, then one of its images uniformly.

    An image with a rare class brings its frequent ones along, so the classes of the boxes that
    training sees are closer to balance than those of the data set, not balanced. An epoch has as
    many draws as the data set has images. Images without boxes are not drawn.

    Args:
        dataset: Built data set, wrapped or not.
        seed: Same on every rank; by default drawn once and shared.
        shuffle: Random order, else data set order.
        max_repeats: Cap on the expected draws of one image in an epoch; what is above goes to the
            other images in proportion to their own. LVIS v1 has 100,000 images and 1,203 classes:
            without a cap the only image of a class is drawn 83 times in each epoch.

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
        self._expected = self._draws_of(0.0)

    def _expected_draws(self, epoch: int) -> np.ndarray:
        return self._expected
