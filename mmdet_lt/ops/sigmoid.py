r"""The sigmoid engine: one weighted binary cross entropy for the whole sigmoid family.

.. math::
    L = \sum_i s_i \sum_j w_{ij}\,\mathrm{BCE}(z_{ij}, t_{ij}), \qquad
    \mathrm{BCE}(z, t) = \mathrm{softplus}(z) - t z

where ``w_ij`` is ``pos_weight[j]`` for the positive entry of a row, ``neg_weight_fg[j]`` for the
negative entries of a foreground row and ``neg_weight_bg[j]`` for those of a background row.

Letters: ``N`` rows (RoIs or anchors), ``K`` columns of logits, ``C <= K`` foreground classes.
``label`` (N,) int64 holds the positive column of each row; a label outside ``[0, K)`` means that
the row has no positive entry. Rows with ``label`` in ``[0, C)`` are foreground.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

#: Rows per block on CPU: 256 x 1203 float32 (1.2 MB) and its sigmoid stay in the L2 cache.
CPU_BLOCK_ROWS = 256
#: Entries per block elsewhere: enough to fill a GPU, small beside the logits of a dense head.
BLOCK_ENTRIES = 1 << 24


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(z: Tensor) -> list[tuple[int, int]]:
    step = CPU_BLOCK_ROWS
    if z.device.type != 'cpu':
        step = max(BLOCK_ENTRIES // max(z.shape[1], 1), 1)
    return [(start, min(start + step, len(z))) for start in range(0, len(z), step)]


def _weighted(rows: Tensor | None, matrix: Tensor) -> Tensor:
    """Column sums of ``matrix`` weighted by ``rows``, as one matrix-vector product."""
    return matrix.sum(0) if rows is None else rows @ matrix


class _WeightedSigmoidLoss(Function):
    """Sum of the loss, its closed-form gradient and the column sums of |gradient| in one pass."""

    @staticmethod
    def forward(ctx, z, label, row_weight, pos_weight, neg_weight_fg, neg_weight_bg, num_fg):
        need_grad = ctx.needs_input_grad[0]
        loss, grad, pos, neg = _pass(
            z, label, row_weight, pos_weight, neg_weight_fg, neg_weight_bg, num_fg, need_grad
        )
        if need_grad:
            ctx.save_for_backward(z, label, row_weight, pos_weight, neg_weight_fg, neg_weight_bg)
            ctx.num_fg = num_fg
            ctx.grad = grad
        ctx.mark_non_differentiable(pos, neg)
        return loss, pos, neg

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _pos, _neg):
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # a second backward over a retained graph
            grad = _pass(*ctx.saved_tensors, ctx.num_fg, True)[1]
        # In place: this function owns the tensor, and a copy would double the peak memory.
        return grad.mul_(grad_loss), None, None, None, None, None, None


def _pass(z, label, row_weight, pos_weight, neg_weight_fg, neg_weight_bg, num_fg, need_grad):
    dtype = compute_dtype(z)
    num_columns = z.shape[1]
    loss = z.new_zeros((), dtype=dtype)
    pos = z.new_zeros(num_columns, dtype=dtype)
    neg = z.new_zeros(num_columns, dtype=dtype)
    grad = torch.empty_like(z) if need_grad else None
    for start, end in _blocks(z):
        zb = z[start:end].to(dtype)
        yb = label[start:end]
        sb = None if row_weight is None else row_weight[start:end]
        has_pos = (yb >= 0) & (yb < num_columns)
        column = yb.clamp(0, num_columns - 1)
        index = column.unsqueeze(1)
        zy = zb.gather(1, index)[:, 0]
        # Positive entries are taken out of the negative sums before summing, not subtracted
        # afterwards: the difference of two large sums would cost digits.
        p = torch.sigmoid(zb)
        py = p.gather(1, index)[:, 0]
        p.scatter_(1, index, py.masked_fill(has_pos, 0).unsqueeze(1))
        soft = F.softplus(zb)
        soft.scatter_(1, index, F.softplus(zy).masked_fill(has_pos, 0).unsqueeze(1))
        if neg_weight_bg is None:
            loss = loss + _weighted(sb, soft) @ neg_weight_fg
            neg += _weighted(sb, p) * neg_weight_fg
        else:
            is_fg = (yb >= 0) & (yb < num_fg)
            kinds = torch.stack([is_fg, ~is_fg]).to(dtype)
            if sb is not None:
                kinds = kinds * sb
            weights = torch.stack([neg_weight_fg, neg_weight_bg])
            loss = loss + (kinds @ soft * weights).sum()
            neg += (kinds @ p * weights).sum(0)
        keep = has_pos.to(dtype) if sb is None else has_pos.to(dtype) * sb
        row_pos = pos_weight[column]
        loss = loss + (keep * row_pos * F.softplus(-zy)).sum()
        pos.index_add_(0, column, keep * row_pos * (1 - py))
        if need_grad:
            if neg_weight_bg is None:
                p.mul_(neg_weight_fg)
            else:
                p.mul_(torch.where(is_fg.unsqueeze(1), neg_weight_fg, neg_weight_bg))
            positive = torch.where(has_pos, row_pos * (py - 1), p.gather(1, index)[:, 0])
            p.scatter_(1, index, positive.unsqueeze(1))
            if sb is not None:
                p.mul_(sb.unsqueeze(1))
            grad[start:end] = p
    return loss, grad, pos, neg


def weighted_sigmoid_loss(
    z: Tensor,
    label: Tensor,
    pos_weight: Tensor,
    neg_weight_fg: Tensor,
    neg_weight_bg: Tensor | None = None,
    row_weight: Tensor | None = None,
    num_fg: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Summed weighted sigmoid loss with integer labels and a closed-form gradient.

    No (N, K) target exists, and the gradient is the only (N, K) tensor that is allocated.

    Args:
        z: Logits, (N, K), any floating dtype; computed in float32 (float64 stays).
        label: Positive column of each row, (N,) int64; outside ``[0, K)``: none.
        pos_weight: Weight of positive entries, (K,).
        neg_weight_fg: Weight of negative entries, (K,); of foreground rows only where
            ``neg_weight_bg`` is given.
        neg_weight_bg: Weight of negative entries of background rows, (K,).
        row_weight: ``s_i``, (N,).
        num_fg: ``C``, to tell foreground rows; ``K`` by default.

    Returns:
        ``(loss, pos_grad, neg_grad)``: the sum, 0-d with gradient, and the column sums of
        ``|dL/dz|`` over positive and over negative entries, (K,) each, without gradient.
    """
    dtype = compute_dtype(z)
    cast = [None if w is None else w.detach().to(dtype) for w in (row_weight, pos_weight)]
    negs = [None if w is None else w.detach().to(dtype) for w in (neg_weight_fg, neg_weight_bg)]
    return _WeightedSigmoidLoss.apply(z, label, *cast, *negs, num_fg or z.shape[1])


def sigmoid_loss_entries(z: Tensor, target: Tensor, entry_weight: Tensor | float = 1.0) -> Tensor:
    """``w_ij * BCE(z_ij, t_ij)`` of every entry, (N, K), differentiable by autograd.

    The eager form: for soft targets, entry weights and ``reduction='none'``.
    """
    dtype = compute_dtype(z)
    entries = F.binary_cross_entropy_with_logits(z.to(dtype), target.to(dtype), reduction='none')
    return entries * entry_weight
