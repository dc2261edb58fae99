r"""Focal loss.

Paper: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017,
https://arxiv.org/abs/1708.02002.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j [\alpha t_{ij} + (1 - \alpha)(1 - t_{ij})]\,
        |t_{ij} - p_{ij}|^{\gamma}\,\mathrm{BCE}(z_{ij}, t_{ij}), \qquad p = \sigma(z)

where ``s_i`` is ``weight`` and ``A`` is ``avg_factor``. Entries that are already right (``p`` near
``t``) lose their weight; classes are all treated alike, so this is a baseline, not a long-tail
method.

Differs from MMDetection's ``FocalLoss``: fits RoI heads (C columns, sigmoid scores, prior), labels
need not stay within ``[0, C]``, and without ``avg_factor`` the mean is over rows, not entries. For
hard targets the values are the same; for soft targets the modulating factor is the distance
``|t - p|``, as in Quality Focal Loss, which is 0 where the score equals its target.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, compute_dtype, sigmoid_terms_loss
from mmdet_lt.registry import MODELS


def focal_terms(ones: Tensor, gamma: float, alpha: float) -> SigmoidTerms:
    """Constants of the engine; ``ones`` (K,) tells their shape, dtype and device."""
    return SigmoidTerms(alpha * ones, (1 - alpha) * ones, gamma=gamma)


def focal_loss(
    z: Tensor,
    label: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Summed focal loss.

    Args:
        z: Logits, (N, C), any floating dtype.
        label: Class of each row, (N,) int64; outside ``[0, C)``: background.
        gamma: Exponent γ, at least 0.
        alpha: Weight α of positive entries; negative ones have ``1 - α``.
        row_weight: ``s_i``, (N,).

    Returns:
        Sum over rows and columns, 0-d.
    """
    ones = z.new_ones(z.shape[1], dtype=compute_dtype(z))
    return sigmoid_terms_loss(z, label, focal_terms(ones, gamma, alpha), row_weight)[0]


def logit_of_score(score: Tensor) -> Tensor:
    """``log(p / (1 - p))`` with bounded slope at both ends; NaN outside of [0, 1].

    A score at 0 or 1 comes from a saturated sigmoid, through which no gradient returns.
    """
    score = score.to(compute_dtype(score))
    score = score.masked_fill(score.abs() < 1e-12, 1e-12)
    score = score.masked_fill(score == 1, 1 - torch.finfo(score.dtype).eps / 2)
    return score.log() - torch.log1p(-score)


@MODELS.register_module()
class FocalLoss(SigmoidLoss):
    """Focal loss, see the formula above.

    Args:
        gamma: Exponent γ.
        alpha: Weight α of positive entries. 0.5 with ``loss_weight=2`` is the loss without α.
        activated: Inputs are scores in [0, 1] instead of logits, as in TOOD's head.
        prior_prob: π the classifier of an RoI head starts from, paper 0.01. Dense heads set
            their own.
        kwargs: Arguments of :class:`LongTailLoss`.

    Shapes: logits (N, C) without a background column, labels (N,), ``weight`` (N,) or (N, C).
    """

    tags = LossTags(
        title='Focal loss',
        paper='ICCV 2017',
        url='https://arxiv.org/abs/1708.02002',
        variants=(dict(gamma=0.0, alpha=0.5), dict(gamma=1.5, alpha=0.9)),
    )

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float = 0.25,
        activated: bool = False,
        prior_prob: float | None = 0.01,
        **kwargs: Any,
    ) -> None:
        if gamma < 0 or not 0 <= alpha <= 1:
            raise InputError(
                '`loss_cls.gamma` must be at least 0 and `loss_cls.alpha` in [0, 1] in FocalLoss, '
                f'found {gamma} and {alpha}.'
            )
        self.gamma, self.alpha, self.activated = gamma, alpha, activated
        super().__init__(prior_prob=prior_prob, **kwargs)

    def terms(self, rows: Rows) -> SigmoidTerms:
        return focal_terms(self.ones(rows), self.gamma, self.alpha)

    def compute(self, rows: Rows) -> Tensor:
        if self.activated:
            rows = replace(rows, z=logit_of_score(rows.z))
        return super().compute(rows)

    def link(self, z: Tensor) -> Tensor:
        return z if self.activated else super().link(z)
