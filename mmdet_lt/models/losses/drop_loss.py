r"""DropLoss: background drops its negatives of tail classes at random.

Paper: Hsieh et al., *DropLoss for Long-Tail Instance Segmentation*, AAAI 2021,
https://arxiv.org/abs/2104.06402. Authors' code: https://github.com/timy90022/DropLoss.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j w_{ij}\,\mathrm{BCE}(z_{ij}, t_{ij}), \qquad
    w_{ij} = \begin{cases}
        1 & t_{ij} = 1 \text{ or } T_j = 0 \\
        0 & T_j = 1, \text{ row } i \text{ is foreground of another class} \\
        [u_{ij} < \rho] & T_j = 1, \text{ row } i \text{ is background}
    \end{cases}

where ``T_j`` is 1 when the image frequency of class j is below ``lambda_``, ``u_ij`` is uniform in
[0, 1), drawn for every entry, ``ρ`` is the fraction of the call's foreground rows whose class is a
tail class, ``s_i`` is ``weight`` and ``A`` is ``avg_factor``. Foreground rows are those of EQL.

A call without foreground has ``ρ = 0``, as one with foreground of head classes only: without a
tail positive there is nothing for tail negatives to be balanced against. (The authors' code takes
the mean of nothing there, NaN, and happens to keep all.) Rows of weight 0 do not count in ``ρ``.
Each rank and call has its own ``ρ``, as in the authors' code; a dense head calls once a level.
``lambda_`` is that of EQL on LVIS v1: the authors' v1 configs use the v0.5 value 0.00177.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdet_lt.models.losses._tail import TailLoss
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, row_blocks, sigmoid_terms_loss
from mmdet_lt.registry import MODELS


def tail_fraction(label: Tensor, tail: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """``ρ``: fraction of the foreground rows of weight above 0 that are tail, 0-d; 0 without any.

    Args:
        label: Class of each row, (N,) int64, C for background.
        tail: ``T``, (C,).
        row_weight: (N,).
    """
    foreground = label < len(tail)
    if row_weight is not None:
        foreground = foreground & (row_weight != 0)
    is_tail = tail[label.clamp_max(len(tail) - 1)] * foreground
    return is_tail.sum() / foreground.sum().clamp_min(1)


def drop_gate(z: Tensor, tail: Tensor, rho: Tensor) -> Tensor:
    """Negatives that background keeps, bool (N, C): all of the head, a fraction ``ρ`` of the tail.

    Drawn block by block: random numbers of the size of the logits would be the largest tensor of
    the loss.
    """
    gate = torch.empty(z.shape, dtype=torch.bool, device=z.device)
    head = tail == 0
    for start, end in row_blocks(z):
        draw = torch.rand(end - start, z.shape[1], device=z.device)
        torch.logical_or(draw < rho, head, out=gate[start:end])
    return gate


def drop_terms(tail: Tensor, gate: Tensor) -> SigmoidTerms:
    """Constants of the engine."""
    ones = torch.ones_like(tail)
    return SigmoidTerms(ones, 1 - tail, ones, gate=gate)


def drop_loss(
    z: Tensor, label: Tensor, tail: Tensor, gate: Tensor, row_weight: Tensor | None = None
) -> Tensor:
    """Summed DropLoss.

    Args:
        z: Logits, (N, C), any floating dtype.
        label: Class of each row, (N,) int64; outside ``[0, C)``: background.
        tail: ``T``, 1 for tail classes, else 0, (C,).
        gate: Negative entries of background rows that are kept, bool (N, C).
        row_weight: ``s_i``, (N,).

    Returns:
        Sum over rows and columns, 0-d.
    """
    return sigmoid_terms_loss(z, label, drop_terms(tail, gate), row_weight)[0]


@MODELS.register_module()
class DropLoss(TailLoss):
    """DropLoss, see the formula above.

    Args:
        lambda_: Frequency threshold λ, a fraction of the annotated images. 1.1e-3 for LVIS v1
            (815 tail classes), 1.77e-3 for LVIS v0.5.
        prior_prob: π the classifier of an RoI head starts from, paper 0.001.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``tail`` (C,).

    Shapes: logits (N, C) without a background column, labels (N,), ``weight`` (N,) or (N, C).
    """

    tags = LossTags(
        title='DropLoss',
        paper='AAAI 2021',
        url='https://arxiv.org/abs/2104.06402',
        statistics=True,
        stochastic=True,
        variants=(dict(lambda_=0.0), dict(lambda_=1.0)),
    )

    def terms(self, rows: Rows) -> SigmoidTerms:
        rho = tail_fraction(rows.label, self.tail, rows.row_weight)
        return drop_terms(self.tail, drop_gate(rows.z, self.tail, rho))
