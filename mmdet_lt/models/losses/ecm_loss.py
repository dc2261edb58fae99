r"""Effective class-margin loss (ECM).

Paper: Cho and Krähenbühl, *Long-tail Detection with Effective Class-Margins*, ECCV 2022,
https://arxiv.org/abs/2301.09724. Authors' code: https://github.com/janghyuncho/ECM-Loss.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j w_j\, \mathrm{BCE}(2 z_{ij} + \delta_j, t_{ij}), \qquad
    \delta_j = \tfrac14 \log \frac{n_j}{T - n_j}, \quad
    w_j = a_j \log \frac{1 + a_j}{a_j}, \quad a_j = \frac{T - n_j}{n_j}

``n_j`` are the images of class j, ``n_C = r \sum_j n_j`` stands for background with
``r = fg_bg_ratio``, ``T`` is the sum of all ``n`` with background, ``s_i`` is ``weight`` and ``A``
is ``avg_factor``. The paper writes the cross entropy of
``e^{z + m⁺} / (e^{z + m⁺} + e^{-z + m⁻})`` with margins
``m⁺ = log((n^¼ + (T - n)^¼) / (T - n)^¼)`` and ``m⁻ = log((n^¼ + (T - n)^¼) / n^¼)``; since
``m⁺ - m⁻ = δ`` this is the form above, which cannot overflow.

Scores at test know neither the factor 2 nor the margin: ``σ(z_j) (1 - σ(z_bg))`` in RoI heads,
``σ(z_j)`` in dense heads.

Differs from the authors' code: ``weight``, ``avg_factor`` and ``reduction_override`` are honoured,
counts come from the training set (theirs from a file in the working directory), and no
exponential overflows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import check_count, class_count
from mmdet_lt.models.losses.rows import Rows, fit_columns
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, sigmoid_terms_loss
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def ecm_margins(count: Tensor, fg_bg_ratio: float = 6.3313) -> tuple[Tensor, Tensor]:
    """``(δ, w)`` of the classes and background, (C + 1,) each.

    Args:
        count: ``n``, at least 1, (C,).
        fg_bg_ratio: Background samples for each foreground sample.
    """
    n = torch.cat([count, fg_bg_ratio * count.sum().reshape(1)])
    odds = n / (n.sum() - n)
    return odds.log() / 4, torch.log1p(odds) / odds


def ecm_loss(
    z: Tensor,
    label: Tensor,
    margin: Tensor,
    column_weight: Tensor,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Summed effective class-margin loss.

    Args:
        z: Logits, (N, K), any floating dtype.
        label: Positive column of each row, (N,) int64; outside ``[0, K)``: none.
        margin: ``δ``, (K,).
        column_weight: ``w``, (K,).
        row_weight: ``s_i``, (N,).

    Returns:
        Sum over rows and columns, 0-d.
    """
    terms = SigmoidTerms(column_weight, column_weight, shift=margin, scale=2.0)
    return sigmoid_terms_loss(z, label, terms, row_weight)[0]


@MODELS.register_module()
class ECMLoss(SigmoidLoss):
    """Effective class-margin loss, see the formula above.

    Args:
        fg_bg_ratio: Background rows for each foreground row; the paper measured 6.3313 in the
            samples of Mask R-CNN.
        count: 'image' (paper) or 'instance': what ``n`` counts.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffers, float32 (C + 1,), saved in checkpoints: ``margin``, ``column_weight``.

    Shapes: logits (N, C + 1) in RoI heads, background last; (N, C) in dense heads.
    """

    tags = LossTags(
        title='Effective class-margin loss',
        paper='ECCV 2022',
        url='https://arxiv.org/abs/2301.09724',
        statistics=True,
        variants=(dict(count='instance'), dict(fg_bg_ratio=1.0)),
    )
    objectness = True
    state_names = ('margin', 'column_weight')
    state_extra = 1

    def __init__(self, fg_bg_ratio: float = 6.3313, count: str = 'image', **kwargs: Any) -> None:
        if fg_bg_ratio <= 0:
            raise InputError(
                f'`loss_cls.fg_bg_ratio` of ECMLoss must be above 0, found {fg_bg_ratio}.'
            )
        self.fg_bg_ratio, self.count = fg_bg_ratio, check_count('ECMLoss', count)
        super().__init__(**kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(margin=num_classes + 1, column_weight=num_classes + 1)

    def take_statistics(self, stats: ClassStatistics) -> None:
        margin, weight = ecm_margins(class_count(stats, self.count), self.fg_bg_ratio)
        self.fill_static(margin=margin, column_weight=weight)

    def terms(self, rows: Rows) -> SigmoidTerms:
        columns = rows.z.shape[1]
        weight = fit_columns(self.column_weight, columns, 1.0)
        return SigmoidTerms(weight, weight, shift=fit_columns(self.margin, columns, 0.0), scale=2.0)
