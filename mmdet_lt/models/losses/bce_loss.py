r"""Binary cross entropy over all classes: the plain baseline of the sigmoid family.

Used as the baseline in Tan et al., *Equalization Loss for Long-Tailed Object Recognition*,
CVPR 2020, https://arxiv.org/abs/2003.05176.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j \mathrm{BCE}(z_{ij}, t_{ij}), \qquad
    \mathrm{BCE}(z, t) = \log(1 + e^z) - t z

where ``s_i`` is ``weight``, ``A`` is ``avg_factor`` and background is the row without a positive
entry. Differs from MMDetection's ``CrossEntropyLoss(use_sigmoid=True)``: no one-hot matrix is
built, the test scores of RoI heads are the sigmoids (MMDetection takes a softmax there), the
classifier of an RoI head starts from ``prior_prob`` and ``ignore_index`` does not exist: rows are
ignored by weight 0.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, compute_dtype, weighted_sigmoid_loss
from mmdet_lt.registry import MODELS


def bce_loss(z: Tensor, label: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """Summed binary cross entropy.

    Args:
        z: Logits, (N, C), any floating dtype.
        label: Class of each row, (N,) int64; outside ``[0, C)``: background.
        row_weight: ``s_i``, (N,).

    Returns:
        Sum over rows and columns, 0-d.
    """
    ones = z.new_ones(z.shape[1], dtype=compute_dtype(z))
    return weighted_sigmoid_loss(z, label, ones, ones, None, row_weight)[0]


@MODELS.register_module()
class BCELoss(SigmoidLoss):
    """Binary cross entropy, see the formula above.

    Args:
        prior_prob: π the classifier of an RoI head starts from. The 0.001 of the EQL family; from
            bias 0 the loss of one row of LVIS would start at ``1203 log 2``.
        kwargs: Arguments of :class:`LongTailLoss`.

    Shapes: logits (N, C) without a background column, labels (N,), ``weight`` (N,) or (N, C).
    """

    tags = LossTags(
        title='Binary cross entropy',
        paper='CVPR 2020',
        url='https://arxiv.org/abs/2003.05176',
    )

    def __init__(self, prior_prob: float | None = 0.001, **kwargs: Any) -> None:
        super().__init__(prior_prob=prior_prob, **kwargs)

    def terms(self, rows: Rows) -> SigmoidTerms:
        ones = self.ones(rows)
        return SigmoidTerms(ones, ones)
