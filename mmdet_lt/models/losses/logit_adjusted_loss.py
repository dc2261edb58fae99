r"""Logit-adjusted cross entropy.

Paper: Menon et al., *Long-tail Learning via Logit Adjustment*, ICLR 2021,
https://arxiv.org/abs/2007.07314.

.. math::
    L = \frac{1}{A} \sum_i s_i\,\mathrm{CE}(z_i + b, y_i), \qquad
    b_c = \tau \log \pi_c, \quad b_{bg} = 0, \quad \pi_c = \frac{\max(n_c, 1)}{\sum_k \max(n_k, 1)}

where ``n_c`` counts the boxes (or images) of class ``c``, ``s_i`` is ``weight`` and ``A`` is
``avg_factor``. Scores at test are ``softmax(z)`` without the offset: the odds of a class to
background are those of training times ``π_c^{-τ}``, so no class scores lower and rare ones score
higher. With ``τ = 1`` the classes stand to each other as in Balanced Softmax, whose counts are not
normalised; only background differs, by ``log Σ n``.

The paper classifies images, so it has no background: here background keeps offset 0, its prior
being left to the classifier's bias. The paper's other form, the same offset subtracted after
training, is a calibrator, not a loss.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import check_count, class_count
from mmdet_lt.models.losses.rows import Rows, fit_columns
from mmdet_lt.models.losses.softmax_loss import SoftmaxLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.softmax import softmax_loss
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def logit_offset(count: Tensor, tau: float = 1.0) -> Tensor:
    """``τ log π``, (C,), from counts of at least 1, (C,)."""
    return tau * (count / count.sum()).log()


def logit_adjusted_loss(z: Tensor, label: Tensor, offset: Tensor) -> Tensor:
    """Loss of each row.

    Args:
        z: Logits, (N, K), any floating dtype, K = C + 1 with background last, or C.
        label: Column of each row, (N,) int64; outside ``[0, K)`` the row's loss is 0.
        offset: ``τ log π`` of the classes, (C,).

    Returns:
        (N,), with gradient.
    """
    return softmax_loss(z, label, fit_columns(offset, z.shape[1], 0.0))


@MODELS.register_module()
class LogitAdjustedLoss(SoftmaxLoss):
    """Logit-adjusted cross entropy, see the formula above.

    Args:
        tau: Strength τ of at least 0; 0 is plain cross entropy, 1 the paper's consistent choice.
        count: ``n_c``: 'instance' for boxes (rows of an RoI head are boxes) or 'image'.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``offset`` (C,).

    Shapes: logits (N, C + 1) with background last, or (N, C); labels (N,).
    """

    tags = LossTags(
        title='Logit adjustment',
        paper='ICLR 2021',
        url='https://arxiv.org/abs/2007.07314',
        statistics=True,
        variants=(dict(tau=0.0), dict(tau=0.5, count='image')),
    )
    state_names = ('offset',)

    def __init__(self, tau: float = 1.0, count: str = 'instance', **kwargs: Any) -> None:
        if not 0 <= tau < math.inf:
            raise InputError(
                f'`loss_cls.tau` of LogitAdjustedLoss must be at least 0, found {tau}.'
            )
        self.tau = tau
        self.count = check_count('LogitAdjustedLoss', count)
        super().__init__(**kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(offset=num_classes)

    def take_statistics(self, stats: ClassStatistics) -> None:
        self.fill_static(offset=logit_offset(class_count(stats, self.count), self.tau))

    def adjustment(self, rows: Rows) -> Tensor:
        return fit_columns(self.offset, rows.z.shape[1], 0.0)
