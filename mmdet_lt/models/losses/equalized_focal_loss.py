r"""Equalized focal loss (EFL), and with soft targets equalized quality focal loss (EQFL).

Paper: Li et al., *Equalized Focal Loss for Dense Long-Tailed Object Detection*, CVPR 2022,
https://arxiv.org/abs/2201.02593. Authors' code: https://github.com/ModelTC/EOD.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j \alpha_{ij} \frac{\gamma_j}{\gamma_b}
        |t_{ij} - p_{ij}|^{\gamma_j}\, \mathrm{BCE}(z_{ij}, t_{ij}), \qquad
    \gamma_j = \gamma_b + s\,(1 - g_j), \quad p = \sigma(z)

    g_j = \mathrm{clamp}\Big(\frac{\sum |\nabla^+_j|}{\sum |\nabla^-_j| + 10^{-10}}, 0, 1\Big)

``α_ij`` is ``focal_alpha`` for positive and ``1 - focal_alpha`` for negative entries, ``s_i`` is
``weight`` and ``A`` is ``avg_factor``. The sums run over everything seen in training; ``g_j``
starts at 1, where the loss is the focal loss. Classes whose negatives outweigh their positives
get a larger exponent, and a weight ``γ_j / γ_b`` that keeps their hard entries.

Gradients are those of the loss as it is returned: divided by ``avg_factor`` and times
``loss_weight``, so that batches with many positives do not dominate the ratio.

Differs from the authors' code: magnitudes come from the closed form of the gradient, so that
neither a backward hook nor the scale of mixed precision is involved, nor the order of the
classifier's channels (theirs reads them as anchor-major where they are class-major);
``-log p`` is computed from the logit and stays finite.

With soft targets the positive entries are those with a target above 0, and count as positive with
their whole gradient, as in the authors' EQFL, which has ``focal_alpha=None``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.running import RunningStatistics
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, sigmoid_terms_entries, sigmoid_terms_loss
from mmdet_lt.registry import MODELS


def efl_terms(
    ratio: Tensor,
    focal_gamma: float = 2.0,
    focal_alpha: float | None = 0.25,
    scale_factor: float = 8.0,
) -> SigmoidTerms:
    """Weights and exponents of the classes for their gradient ratio ``g`` (C,)."""
    gamma = focal_gamma + scale_factor * (1 - ratio)
    weight = gamma / focal_gamma
    if focal_alpha is None:
        return SigmoidTerms(weight, weight, gamma=gamma)
    return SigmoidTerms(focal_alpha * weight, (1 - focal_alpha) * weight, gamma=gamma)


def equalized_focal_loss(
    z: Tensor, label: Tensor, ratio: Tensor, row_weight: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed equalized focal loss and the gradient magnitudes it causes.

    Args:
        z: Logits, (N, C), any floating dtype.
        label: Class of each row, (N,) int64; outside ``[0, C)``: background.
        ratio: ``g``, (C,), in [0, 1].
        row_weight: ``s_i``, (N,).
        kwargs: ``focal_gamma``, ``focal_alpha`` and ``scale_factor`` of :func:`efl_terms`.

    Returns:
        ``(loss, pos_grad, neg_grad)``: 0-d, (C,), (C,).
    """
    return sigmoid_terms_loss(z, label, efl_terms(ratio, **kwargs), row_weight)


@MODELS.register_module()
class EqualizedFocalLoss(RunningStatistics, SigmoidLoss):
    """Equalized focal loss, see the formula above.

    Args:
        focal_gamma: Exponent ``γ_b`` of a balanced class.
        focal_alpha: α of positive entries; None for no such factor (EQFL).
        scale_factor: ``s``, the largest growth of the exponent; paper 8, for YOLOX 4.
        prior_prob: π the classifier of an RoI head starts from, paper 0.001. Dense heads have a
            setting of their own (``init_cfg``, ``bias_prob``).
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffers, float32 (C,), saved in checkpoints: ``pos_grad``, ``neg_grad``, ``pos_neg``.

    Shapes: logits (N, C) without a background column; labels (N,), soft targets (N, C) or
    (label, quality).
    """

    tags = LossTags(
        title='Equalized focal loss',
        paper='CVPR 2022',
        url='https://arxiv.org/abs/2201.02593',
        running=True,
        variants=(dict(focal_alpha=None, scale_factor=4.0), dict(scale_factor=0.0)),
    )
    state_names = ('pos_grad', 'neg_grad', 'pos_neg')

    def __init__(
        self,
        focal_gamma: float = 2.0,
        focal_alpha: float | None = 0.25,
        scale_factor: float = 8.0,
        prior_prob: float | None = 0.001,
        **kwargs: Any,
    ) -> None:
        if focal_gamma <= 0 or scale_factor < 0:
            raise InputError(
                '`loss_cls.focal_gamma` must be above 0 and `loss_cls.scale_factor` at least 0 in '
                f'EqualizedFocalLoss, found {focal_gamma} and {scale_factor}.'
            )
        if focal_alpha is not None and not 0 < focal_alpha < 1:
            raise InputError(
                '`loss_cls.focal_alpha` of EqualizedFocalLoss must lie in (0, 1) or be None, found '
                f'{focal_alpha}.'
            )
        self.focal_gamma, self.focal_alpha = focal_gamma, focal_alpha
        self.scale_factor = scale_factor
        super().__init__(prior_prob=prior_prob, **kwargs)
        self.init_running()

    def size_buffers(self, num_classes: int) -> None:
        self.register_buffer('pos_grad', torch.zeros(num_classes))
        self.register_buffer('neg_grad', torch.zeros(num_classes))
        self.register_buffer('pos_neg', torch.ones(num_classes))

    def increment_like(self) -> Tensor:
        return torch.stack([self.pos_grad, self.neg_grad])

    def apply_increment(self, increment: Tensor) -> None:
        self.pos_grad = self.pos_grad + increment[0]
        self.neg_grad = self.neg_grad + increment[1]
        ratio = (self.pos_grad / (self.neg_grad + 1e-10)).clamp(0, 1)
        # Nothing seen at all (an epoch of empty batches) leaves the ratio where it was.
        self.pos_neg = torch.where(self.pos_grad + self.neg_grad > 0, ratio, self.pos_neg)

    def reset_running(self) -> None:
        self.size_buffers(self.num_classes)

    def terms(self, rows: Rows) -> SigmoidTerms:
        return efl_terms(self.pos_neg, self.focal_gamma, self.focal_alpha, self.scale_factor)

    def compute(self, rows: Rows) -> Tensor:
        if rows.soft is None or not rows.count:
            return super().compute(rows)
        terms = self.weighted_terms(rows)
        entries, size = sigmoid_terms_entries(
            rows.z, rows.soft, rows.is_fg, terms, rows.entry_weight
        )
        positive = rows.soft > 0
        self.observe(rows, (size * positive).sum(0), (size * ~positive).sum(0))
        return entries.sum()

    def observe(self, rows: Rows, pos_grad: Tensor, neg_grad: Tensor) -> None:
        returned = self.loss_weight / rows.divisor
        self.add_increment(torch.stack([pos_grad, neg_grad]) * returned)
