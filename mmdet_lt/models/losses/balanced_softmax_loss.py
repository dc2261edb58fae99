r"""Balanced Softmax: cross entropy under the class prior of the training set.

Paper: Ren et al., *Balanced Meta-Softmax for Long-Tailed Visual Recognition*, NeurIPS 2020,
https://arxiv.org/abs/2007.10740. Authors' code:
https://github.com/jiawei-ren/BalancedMetaSoftmax-Classification.

.. math::
    L = \frac{1}{A} \sum_i s_i\,\mathrm{CE}(z_i + b, y_i), \qquad b_c = \log \max(n_c, 1), \quad
    b_{bg} = 0 \ \text{or}\ \log\big(r \textstyle\sum_c n_c\big)

where ``n_c`` counts the boxes (or images) of class ``c``, ``r`` is ``background_ratio``, ``s_i`` is
``weight`` and ``A`` is ``avg_factor``. The offset ``b`` exists in training only: scores at test are
``softmax(z)``, as if every class had been equally frequent.

The paper classifies images, so it has no background. The choice of ``b_bg`` leaves the order of
the classes within a box alone and sets how high they score against background: at test the odds of
a class to background are those of training times ``exp(b_bg - b_c)``, that is

- ``b_bg = 0``: divided by ``n_c``. Classes score low, frequent ones lowest: lower ``score_thr``.
- ``b_bg = log(r Σ n)``: multiplied by ``r Σ n / n_c``. This is the paper's rule with background as
  one more class that has ``r Σ n`` samples; the ECM loss uses the empirical ratio 6.3313. Classes
  score high, rare ones highest.

Differs from the authors' code: ``weight``, ``avg_factor`` and ``reduction_override`` are honoured,
absent classes count as 1 (their offset would be minus infinity), background exists.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import check_count, class_count
from mmdet_lt.models.losses.reweighting import with_background
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.softmax_loss import SoftmaxLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.softmax import softmax_loss
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def balanced_offset(count: Tensor, background_ratio: float | None = None) -> Tensor:
    """``b``, (C + 1,) with background last, from counts of at least 1, (C,)."""
    background = 0.0
    if background_ratio is not None:
        background = math.log(background_ratio * float(count.sum()))
    return with_background(count.log(), background)


def balanced_softmax_loss(z: Tensor, label: Tensor, offset: Tensor) -> Tensor:
    """Loss of each row.

    Args:
        z: Logits, (N, K), any floating dtype, K = C + 1, or C without background.
        label: Column of each row, (N,) int64; outside ``[0, K)`` the row's loss is 0.
        offset: ``b``, (C + 1,) with background last.

    Returns:
        (N,), with gradient.
    """
    return softmax_loss(z, label, offset[: z.shape[1]])


@MODELS.register_module()
class BalancedSoftmaxLoss(SoftmaxLoss):
    """Balanced Softmax, see the formula above.

    Args:
        background_ratio: ``r``, rows of background per row of foreground, above 0; None gives
            background the offset 0.
        count: ``n_c``: 'instance' for boxes (rows of an RoI head are boxes) or 'image'.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``offset`` (C + 1,), background last.

    Shapes: logits (N, C + 1) with background last, or (N, C); labels (N,).
    """

    tags = LossTags(
        title='Balanced Softmax',
        paper='NeurIPS 2020',
        url='https://arxiv.org/abs/2007.10740',
        statistics=True,
        variants=(dict(background_ratio=6.3313), dict(count='image')),
    )
    state_names = ('offset',)
    state_extra = 1

    def __init__(
        self, background_ratio: float | None = None, count: str = 'instance', **kwargs: Any
    ) -> None:
        if background_ratio is not None and not 0 < background_ratio < math.inf:
            raise InputError(
                '`loss_cls.background_ratio` of BalancedSoftmaxLoss must be above 0 or None, found '
                f'{background_ratio}.'
            )
        self.background_ratio = background_ratio
        self.count = check_count('BalancedSoftmaxLoss', count)
        super().__init__(**kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(offset=num_classes + 1)

    def take_statistics(self, stats: ClassStatistics) -> None:
        self.fill_static(
            offset=balanced_offset(class_count(stats, self.count), self.background_ratio)
        )

    def adjustment(self, rows: Rows) -> Tensor:
        return self.offset[: rows.z.shape[1]]
