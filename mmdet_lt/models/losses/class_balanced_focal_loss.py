r"""Class-balanced focal loss: the sigmoid form of the class-balanced loss.

Paper: Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019,
https://arxiv.org/abs/1901.05555. Authors' code:
https://github.com/richardaecn/class-balanced-loss.

.. math::
    L = \frac{1}{A} \sum_i s_i\,w_{y_i} \sum_j |t_{ij} - \sigma(z_{ij})|^\gamma\,
        \mathrm{BCE}(z_{ij}, t_{ij})

with the weights ``w`` of :mod:`mmdet_lt.models.losses.class_balanced_loss`, 1 for background rows.
A weight belongs to the whole row: the entries of the other classes take that of the row's label.
``γ = 0`` is class-balanced BCE. There is no factor α: the class weights take its place.

Differs from the authors' code: the divisor is ``avg_factor``; background is the all-zero row of
targets; absent classes count as 1; the gradient is in closed form, which stays finite where the
focal factor underflows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import check_count, class_count
from mmdet_lt.models.losses.class_balanced_loss import (
    check_effective_number,
    effective_number_weight,
)
from mmdet_lt.models.losses.reweighting import ClassReweighting, with_background
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, compute_dtype, sigmoid_terms_loss
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def class_balanced_focal_loss(
    z: Tensor, label: Tensor, class_weight: Tensor, gamma: float = 0.5
) -> Tensor:
    """Summed class-balanced focal loss.

    Args:
        z: Logits, (N, C), any floating dtype.
        label: Class of each row, (N,) int64 in ``[0, C]``, C for background.
        class_weight: ``w``, (C + 1,), background last.
        gamma: Focal exponent γ.

    Returns:
        Sum over rows and columns, 0-d.
    """
    ones = z.new_ones(z.shape[1], dtype=compute_dtype(z))
    terms = SigmoidTerms(ones, ones, gamma=gamma or None)
    return sigmoid_terms_loss(z, label, terms, class_weight[label])[0]


@MODELS.register_module()
class ClassBalancedFocalLoss(ClassReweighting, SigmoidLoss):
    """Class-balanced focal loss, see the formula above.

    ``DeferredRebalancingHook`` can switch the weights on later in training (DRW).

    Args:
        gamma: Focal exponent γ of at least 0. With soft targets take 0 or at least 1: below 1 the
            gradient has no bound where a score meets its target.
        beta: β in [0, 1).
        max_weight: Largest weight of a class; None cuts nothing.
        count: ``n_c``: 'instance' for boxes or 'image'.
        prior_prob: π the classifier of an RoI head starts from; about ``1 / C``.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``balance_weight`` (C + 1,), background last.

    Shapes: logits (N, C) without a background column, labels (N,), ``weight`` (N,) or (N, C).
    """

    tags = LossTags(
        title='Class-balanced focal loss',
        paper='CVPR 2019',
        url='https://arxiv.org/abs/1901.05555',
        statistics=True,
        variants=(dict(gamma=0.0), dict(gamma=2.0, beta=0.99), dict(max_weight=2.0)),
    )
    state_names = ('balance_weight',)
    state_extra = 1

    def __init__(
        self,
        gamma: float = 0.5,
        beta: float = 0.9999,
        max_weight: float | None = None,
        count: str = 'instance',
        prior_prob: float | None = 0.001,
        **kwargs: Any,
    ) -> None:
        if not 0 <= gamma < math.inf:
            raise InputError(
                f'`loss_cls.gamma` of ClassBalancedFocalLoss must be at least 0, found {gamma}.'
            )
        check_effective_number('ClassBalancedFocalLoss', beta, max_weight)
        self.gamma, self.beta, self.max_weight = gamma, beta, max_weight
        self.count = check_count('ClassBalancedFocalLoss', count)
        super().__init__(prior_prob=prior_prob, **kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(balance_weight=num_classes + 1)

    def take_statistics(self, stats: ClassStatistics) -> None:
        count = class_count(stats, self.count)
        weight = effective_number_weight(count, self.beta, self.max_weight)
        self.fill_static(balance_weight=with_background(weight))

    def terms(self, rows: Rows) -> SigmoidTerms:
        ones = self.ones(rows)
        return SigmoidTerms(ones, ones, gamma=self.gamma or None)

    def compute(self, rows: Rows) -> Tensor:
        class_weight = self.label_weight()
        if class_weight is not None:
            factor = class_weight.to(compute_dtype(rows.z))[rows.label]
            weight = rows.weight
            if weight is not None:
                factor = weight * (factor if weight.dim() == 1 else factor[:, None])
            rows = replace(rows, weight=factor)
        return super().compute(rows)
