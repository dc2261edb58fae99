r"""Gumbel optimised loss (GOL) and the plain Gumbel cross entropy.

Paper: Alexandridis et al., *Long-tailed Instance Segmentation using Gumbel Optimized Loss*,
ECCV 2022, https://arxiv.org/abs/2207.10936. Authors' code: https://github.com/kostas1515/GOL.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j w_{ij}\,\ell(x_{ij}, t_{ij}), \qquad
    p = e^{-e^{-x}}, \quad
    \ell(x, t) = -t \log p - (1 - t) \log (1 - p) = t u - (1 - t) \log(1 - e^{-u}), \quad
    u = e^{-x}

    \frac{d \ell}{d x} = -t u + (1 - t) \frac{u}{e^u - 1}, \qquad x = \mathrm{clamp}(z, -4, 10)

The Gumbel distribution function ``p`` takes the place of the sigmoid: below 0 its logarithm falls
exponentially, not linearly, so positives with low scores, those of rare classes, pull harder.
Outside of [-4, 10] the gradient is 0; scores at test, ``exp(-exp(-z))``, are not clamped.

``s_i`` is ``weight``, ``A`` is ``avg_factor``. ``w_ij`` is 1 unless ``mask`` takes negatives of
tail classes (image frequency below ``lambda_``) away: 'eql' those of foreground rows, as
:mod:`eql_loss` does; 'drop' also some of background rows, drawn as in :mod:`drop_loss`.

Differs from the authors' code: the reduced loss is not clamped to 20, which from a classifier with
bias 0 leaves no gradient at all; the loss comes from the closed form, not from probabilities;
``weight`` and ``avg_factor`` are honoured with masks, too.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.drop_loss import drop_gate, drop_terms, tail_fraction
from mmdet_lt.models.losses.element_loss import ElementLoss
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.element import Element
from mmdet_lt.ops.sigmoid import SigmoidTerms, compute_dtype
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics

#: Where the loss clamps the logits.
LOW, HIGH = -4.0, 10.0
MASKS = ('none', 'eql', 'drop')


def gumbel_cross_entropy(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``(l, dl/dz)`` of logits and targets in [0, 1], all of one shape, float32 or float64."""
    u = torch.exp(-z.clamp(LOW, HIGH))
    # 1 - exp(-u) in the form that keeps digits, below and above u = log 2.
    negative = -torch.where(u < 0.7, torch.log(-torch.expm1(-u)), torch.log1p(-torch.exp(-u)))
    slope = (1 - target) * u / torch.expm1(u) - target * u
    return target * u + (1 - target) * negative, slope * ((z >= LOW) & (z <= HIGH))


@MODELS.register_module()
class GumbelLoss(ElementLoss):
    """Gumbel optimised loss, see the formula above.

    Args:
        mask: Which negatives of tail classes do not count: 'drop' (GOL: those of DropLoss), 'eql'
            (those of the equalization loss) or 'none' (Gumbel cross entropy with a background
            column in RoI heads).
        lambda_: Frequency threshold of tail classes, a fraction of the annotated images: 1.1e-3
            for LVIS v1. Not used with ``mask='none'``, which needs no class statistics.
        prior_prob: π the classifier of an RoI head starts from; bias ``-log(-log π)``. The default
            gives the paper's bias -2. Dense heads set their own bias for a sigmoid, which is below
            the clamp here: override it, see the documentation.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``tail`` (C,), unless ``mask='none'``.

    Shapes: logits (N, C), with ``mask='none'`` (N, C + 1) in RoI heads, background last.
    """

    tags = LossTags(
        title='Gumbel optimised loss',
        paper='ECCV 2022',
        url='https://arxiv.org/abs/2207.10936',
        statistics=True,
        stochastic=True,
        bounded_logits=True,
        variants=(dict(mask='eql'), dict(mask='none'), dict(lambda_=1.0)),
    )
    score_times_objectness = False

    def __init__(
        self,
        mask: str = 'drop',
        lambda_: float = 0.0011,
        prior_prob: float | None = 6.1798e-4,
        **kwargs: Any,
    ) -> None:
        if mask not in MASKS:
            raise InputError(
                f'`loss_cls.mask` of GumbelLoss must be one of {MASKS}, found {mask!r}.'
            )
        if not 0 <= lambda_ <= 1:
            raise InputError(
                '`loss_cls.lambda_` of GumbelLoss is a fraction of images in [0, 1], found '
                f'{lambda_}.'
            )
        self.mask, self.lambda_ = mask, lambda_
        self.objectness = mask == 'none'
        self.state_names = () if mask == 'none' else ('tail',)
        self.tags = replace(type(self).tags, statistics=mask != 'none', stochastic=mask == 'drop')
        super().__init__(prior_prob=prior_prob, **kwargs)

    def size_buffers(self, num_classes: int) -> None:
        if self.mask != 'none':
            self.declare_static(tail=num_classes)

    def take_statistics(self, stats: ClassStatistics) -> None:
        if self.mask != 'none':
            self.fill_static(tail=stats.image_frequency < self.lambda_)

    def terms(self, rows: Rows) -> SigmoidTerms:
        if self.mask == 'none':
            return super().terms(rows)
        gate = None
        if self.mask == 'drop':
            rho = tail_fraction(rows.label, self.tail, rows.row_weight)
            gate = drop_gate(rows.z, self.tail, rho)
        return drop_terms(self.tail, gate)

    def element(self, rows: Rows) -> Element:
        return gumbel_cross_entropy

    # ---- scores ----------------------------------------------------------------------------

    def prior_bias(self) -> float | None:
        return None if self.prior_prob is None else -math.log(-math.log(self.prior_prob))

    def link(self, z: Tensor) -> Tensor:
        return torch.exp(-torch.exp(-z.to(compute_dtype(z))))
