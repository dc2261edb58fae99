r"""Equalization loss v2 (EQLv2): gradient-guided re-weighting.

Paper: Tan et al., *Equalization Loss v2: A New Gradient Balance Approach for Long-tailed Object
Detection*, CVPR 2021, https://arxiv.org/abs/2012.08548. Authors' code:
https://github.com/tztztztztz/eqlv2.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j [w^+_j t_{ij} + w^-_j (1 - t_{ij})]\,
        \mathrm{BCE}(z_{ij}, t_{ij})

    w^-_j = \phi(g_j), \quad w^+_j = 1 + \alpha (1 - w^-_j), \quad
    \phi(x) = \frac{1}{1 + e^{-\gamma (x - \mu)}}, \quad
    g_j = \frac{\sum |\nabla^+_j|}{\sum |\nabla^-_j| + 10^{-10}}

The sums run over everything seen in training; ``g_j`` starts at 100. The objectness column of RoI
heads always has weight 1. Scores at test: ``σ(z_j) (1 - σ(z_bg))`` in RoI heads, ``σ(z_j)`` in
dense heads.

Differs from the authors' code and from MMDetection's ``EQLV2Loss``: ``weight``, ``avg_factor`` and
``reduction_override`` are honoured, gradient sums are equal on every rank, the scores above are
really used at test, and dense heads work (without the objectness column, for which they have no
room). Gradient magnitudes include ``weight`` but not ``avg_factor`` and ``loss_weight``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.rows import Rows, fit_columns
from mmdet_lt.models.losses.running import RunningStatistics
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, weighted_sigmoid_loss
from mmdet_lt.registry import MODELS

#: Gradient ratio before anything was seen: far above μ, so that all weights start at 1.
INITIAL_RATIO = 100.0


def eqlv2_weights(
    ratio: Tensor, gamma: float = 12.0, mu: float = 0.8, alpha: float = 4.0
) -> tuple[Tensor, Tensor]:
    """``(w⁺, w⁻)`` of the gradient ratio ``g`` (C,)."""
    neg_weight = torch.sigmoid(gamma * (ratio - mu))
    return 1 + alpha * (1 - neg_weight), neg_weight


def eqlv2_loss(
    z: Tensor,
    label: Tensor,
    pos_weight: Tensor,
    neg_weight: Tensor,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed EQLv2 loss and the gradient magnitudes it causes.

    Args:
        z: Logits, (N, K), any floating dtype.
        label: Positive column of each row, (N,) int64; outside ``[0, K)``: none.
        pos_weight: ``w⁺``, (K,).
        neg_weight: ``w⁻``, (K,).
        row_weight: ``s_i``, (N,).

    Returns:
        ``(loss, pos_grad, neg_grad)``: 0-d, (K,), (K,).
    """
    return weighted_sigmoid_loss(z, label, pos_weight, neg_weight, None, row_weight)


@MODELS.register_module()
class EQLv2Loss(RunningStatistics, SigmoidLoss):
    """Equalization loss v2, see the formula above.

    Args:
        gamma: Slope γ of φ.
        mu: Centre μ of φ.
        alpha: Strength α of the positive weight.
        prior_prob: π the classifier of an RoI head starts from (all columns), paper 0.001.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffers, float32 (C,), saved in checkpoints: ``pos_grad``, ``neg_grad``, ``pos_neg``.

    Shapes: logits (N, C + 1) in RoI heads, (N, C) in dense heads.
    """

    tags = LossTags(
        title='Equalization loss v2',
        paper='CVPR 2021',
        url='https://arxiv.org/abs/2012.08548',
        running=True,
        variants=(dict(alpha=0.0), dict(gamma=2.0, mu=0.1)),
    )
    objectness = True
    state_names = ('pos_grad', 'neg_grad', 'pos_neg')

    def __init__(
        self,
        gamma: float = 12.0,
        mu: float = 0.8,
        alpha: float = 4.0,
        prior_prob: float | None = 0.001,
        **kwargs: Any,
    ) -> None:
        if gamma <= 0 or alpha < 0:
            raise InputError(
                '`loss_cls.gamma` must be above 0 and `loss_cls.alpha` at least 0 in EQLv2Loss, '
                f'found {gamma} and {alpha}.'
            )
        self.gamma, self.mu, self.alpha = gamma, mu, alpha
        super().__init__(prior_prob=prior_prob, **kwargs)
        self.init_running()

    def size_buffers(self, num_classes: int) -> None:
        self.register_buffer('pos_grad', torch.zeros(num_classes))
        self.register_buffer('neg_grad', torch.zeros(num_classes))
        self.register_buffer('pos_neg', torch.full((num_classes,), INITIAL_RATIO))

    def increment_like(self) -> Tensor:
        return torch.stack([self.pos_grad, self.neg_grad])

    def apply_increment(self, increment: Tensor) -> None:
        # New tensors: an in-place change would spoil a graph that still holds the old weights.
        self.pos_grad = self.pos_grad + increment[0]
        self.neg_grad = self.neg_grad + increment[1]
        ratio = self.pos_grad / (self.neg_grad + 1e-10)
        # Nothing seen at all (an epoch of empty batches) leaves the ratio where it was.
        self.pos_neg = torch.where(self.pos_grad + self.neg_grad > 0, ratio, self.pos_neg)

    def reset_running(self) -> None:
        self.size_buffers(self.num_classes)

    def terms(self, rows: Rows) -> SigmoidTerms:
        pos, neg = eqlv2_weights(self.pos_neg, self.gamma, self.mu, self.alpha)
        num_columns = rows.z.shape[1]
        return SigmoidTerms(fit_columns(pos, num_columns, 1.0), fit_columns(neg, num_columns, 1.0))

    def observe(self, rows: Rows, pos_grad: Tensor, neg_grad: Tensor) -> None:
        self.add_increment(torch.stack([pos_grad, neg_grad]))
