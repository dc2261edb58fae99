r"""Adaptive class suppression loss (ACSL).

Paper: Wang et al., *Adaptive Class Suppression Loss for Long-Tail Object Detection*, CVPR 2021,
https://arxiv.org/abs/2104.00885. Authors' code: https://github.com/CASIA-IVA-Lab/ACSL.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j w_{ij}\,\mathrm{BCE}(z_{ij}, t_{ij}), \qquad
    w_{ij} = \begin{cases}
        1 & t_{ij} = 1 \\
        [\sigma(z_{ij}) \ge \xi] & t_{ij} = 0, \text{ row } i \text{ is foreground} \\
        [i \in B_{g(j)}] & t_{ij} = 0, \text{ row } i \text{ is background}
    \end{cases}

A foreground row suppresses only the classes it confuses with its own, those with scores of at
least ``ξ`` (no gradient through the test). ``g(j)`` is the group of class j, rare, common or
frequent, and ``B_g`` a random subset of ``floor(n q_g)`` of the ``n`` background rows, ``q`` being
``group_fractions``; ``s_i`` is ``weight`` and ``A`` is ``avg_factor``.

RoI heads have an objectness column, 1 for background, which foreground rows also gate by ``ξ``; at
test the scores of classes are plain sigmoids. Dense heads have no room for it.

Differs from the authors' code: ``weight``, ``avg_factor`` and ``loss_weight`` are honoured, rows of
weight 0 are never drawn nor counted in ``n``, groups come from the class statistics, and the draw
is made where the logits are, instead of by NumPy. Comments there speak of thirds, its numbers are
the defaults here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.rows import Rows, fit_columns
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, compute_dtype, sigmoid_terms_loss
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import GROUPS, ClassStatistics


def draw_rows(eligible: Tensor, fractions: Sequence[float]) -> Tensor:
    """A random subset of rows for each fraction, bool (G, N).

    Args:
        eligible: Rows to draw from, bool (N,), n of them.
        fractions: ``q``, G numbers in [0, 1]; subset g has exactly ``floor(n q_g)`` rows.
    """
    key = torch.rand(len(fractions), len(eligible), device=eligible.device)
    order = key.masked_fill(~eligible, 2.0).argsort(1)
    # float64: the product must fall on the same whole number as Python's.
    available = eligible.sum().double()
    size = torch.stack([(available * fraction).floor() for fraction in fractions])
    rank = torch.arange(len(eligible), device=eligible.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, rank < size[:, None])


def acsl_gate(z: Tensor, is_fg: Tensor, chosen: Tensor, group: Tensor, score_thr: float) -> Tensor:
    """Negative entries that count, bool (N, K).

    Args:
        z: Logits, (N, K).
        is_fg: Foreground rows, bool (N,).
        chosen: ``B``, the background rows drawn for each group, bool (G, N).
        group: Group of each class, int64 (C,).
        score_thr: ``ξ``.
    """
    # Logits are compared: a tensor of scores would be as large as the logits.
    if 0 < score_thr < 1:
        threshold = math.log(score_thr / (1 - score_thr))
    else:
        threshold = math.copysign(math.inf, score_thr - 0.5)
    high = z.detach().to(compute_dtype(z)) >= threshold
    # A column beside the classes belongs to no group: it is no negative of a background row.
    drawn = F.pad(chosen.T, (0, 1))
    group = fit_columns(group, z.shape[1], len(chosen))
    return torch.where(is_fg[:, None], high, drawn.index_select(1, group))


def acsl_loss(
    z: Tensor,
    label: Tensor,
    gate: Tensor,
    row_weight: Tensor | None = None,
    num_fg: int | None = None,
) -> Tensor:
    """Summed adaptive class suppression loss.

    Args:
        z: Logits, (N, K), any floating dtype.
        label: Positive column of each row, (N,) int64; outside ``[0, K)``: none.
        gate: Negative entries that count, bool (N, K).
        row_weight: ``s_i``, (N,).
        num_fg: C; K by default.

    Returns:
        Sum over rows and columns, 0-d.
    """
    ones = z.new_ones(z.shape[1], dtype=compute_dtype(z))
    return sigmoid_terms_loss(z, label, SigmoidTerms(ones, ones, gate=gate), row_weight, num_fg)[0]


@MODELS.register_module()
class ACSLLoss(SigmoidLoss):
    """Adaptive class suppression loss, see the formula above.

    Args:
        score_thr: ``ξ``, in [0, 1].
        group_fractions: ``q`` of rare, common and frequent classes.
        prior_prob: π the classifier of an RoI head starts from, paper 0.01.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``group`` (C,), 0 rare, 1 common, 2 frequent.

    Shapes: logits (N, C + 1) in RoI heads, (N, C) in dense heads; labels (N,), ``weight`` (N,) or
    (N, K).
    """

    tags = LossTags(
        title='Adaptive class suppression loss',
        paper='CVPR 2021',
        url='https://arxiv.org/abs/2104.00885',
        statistics=True,
        stochastic=True,
        variants=(dict(score_thr=0.0, group_fractions=(1, 1, 1)), dict(score_thr=1.0)),
    )
    objectness = True
    score_times_objectness = False
    state_names = ('group',)

    def __init__(
        self,
        score_thr: float = 0.7,
        group_fractions: Sequence[float] = (0.01, 0.1, 1.0),
        prior_prob: float | None = 0.01,
        **kwargs: Any,
    ) -> None:
        if not 0 <= score_thr <= 1:
            raise InputError(
                f'`loss_cls.score_thr` of ACSLLoss is a score in [0, 1], found {score_thr}.'
            )
        fractions = tuple(group_fractions)
        if len(fractions) != len(GROUPS) or not all(0 <= q <= 1 for q in fractions):
            raise InputError(
                '`loss_cls.group_fractions` of ACSLLoss must be three numbers in [0, 1], of rare, '
                f'common and frequent classes, found {group_fractions!r}.'
            )
        self.score_thr, self.group_fractions = score_thr, fractions
        super().__init__(prior_prob=prior_prob, **kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(group=num_classes)

    def take_statistics(self, stats: ClassStatistics) -> None:
        self.fill_static(group=np.asarray([GROUPS.index(name) for name in stats.groups]))

    def terms(self, rows: Rows) -> SigmoidTerms:
        background, weight = ~rows.is_fg, rows.row_weight
        if weight is not None:
            background = background & (weight != 0)
        chosen = draw_rows(background, self.group_fractions)
        gate = acsl_gate(rows.z, rows.is_fg, chosen, self.group.long(), self.score_thr)
        ones = self.ones(rows)
        return SigmoidTerms(ones, ones, gate=gate)
