r"""The sigmoid engine: one weighted binary cross entropy for the whole sigmoid family.

.. math::
    L = \sum_i s_i \sum_j w_{ij}\,|t_{ij} - p_{ij}|^{\gamma_j}\,\mathrm{BCE}(x_{ij}, t_{ij}), \qquad
    x_{ij} = a z_{ij} + b_{ij}, \quad p = \sigma(x), \quad
    \mathrm{BCE}(x, t) = \mathrm{softplus}(x) - t x

where ``w_ij`` is ``pos_weight[j]`` for the positive entry of a row, ``neg_weight[j]`` for the
negative entries of a foreground row and ``neg_weight_bg[j]`` for those of a background row; ``b``
is ``shift`` or, in background rows, ``shift_bg``. Soft targets interpolate between the two weights.

Letters: ``N`` rows (RoIs or anchors), ``K`` columns of logits, ``C <= K`` foreground classes.
``label`` (N,) int64 holds the positive column of each row; a label outside ``[0, K)`` means that
the row has no positive entry. Rows with ``label`` in ``[0, C)`` are foreground.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

#: Entries per block on CPU: temporaries of 0.5 MB stay in the cache, small beside the logits.
CPU_BLOCK_ENTRIES = 1 << 17
#: Entries per block elsewhere: enough to fill a GPU, small beside the logits of a dense head.
BLOCK_ENTRIES = 1 << 24


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def grad_dtype(z: Tensor) -> torch.dtype:
    """Type of a stored gradient: float16 would underflow before the loss scale is applied."""
    return torch.float32 if z.dtype == torch.float16 else z.dtype


def row_blocks(z: Tensor) -> list[tuple[int, int]]:
    """(start, end) of blocks of rows that keep temporaries small."""
    entries = CPU_BLOCK_ENTRIES if z.device.type == 'cpu' else BLOCK_ENTRIES
    step = max(entries // max(z.shape[1], 1), 1)
    return [(start, min(start + step, len(z))) for start in range(0, len(z), step)]


@dataclass
class SigmoidTerms:
    """What distinguishes one loss of the family from another; constants without gradient.

    Attributes:
        pos_weight: Weight of positive entries, (K,).
        neg_weight: Weight of negative entries, (K,); of foreground rows only where
            ``neg_weight_bg`` is given.
        neg_weight_bg: Weight of negative entries of background rows, (K,).
        gamma: Focal exponent, (K,) or a number; None is 0.
        gate: Negative entries that count, bool (N, K); None is all.
        shift: Added to the logits, (K,); of foreground rows only where ``shift_bg`` is given.
        shift_bg: Added to the logits of background rows, (K,).
        scale: Factor of the logits.
    """

    pos_weight: Tensor
    neg_weight: Tensor
    neg_weight_bg: Tensor | None = None
    gamma: Tensor | float | None = None
    gate: Tensor | None = None
    shift: Tensor | None = None
    shift_bg: Tensor | None = None
    scale: float = 1.0

    def cast(self, dtype: torch.dtype) -> SigmoidTerms:
        """Detached copy whose floating tensors have ``dtype``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                values[name] = value.detach().to(dtype)
        return SigmoidTerms(**values)


def _logits(z: Tensor, terms: SigmoidTerms, is_fg: Tensor) -> Tensor:
    """``a z + b``."""
    if terms.scale != 1.0:
        z = z * terms.scale
    if terms.shift_bg is not None:
        # Rows by index: several times faster on CPU than `where` of two broadcast vectors.
        shifts = torch.stack([terms.shift_bg, terms.shift])
        return shifts.index_select(0, is_fg.long()).add_(z)
    return z if terms.shift is None else z + terms.shift


def _focal(prob: Tensor, loss: Tensor, gamma: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """``(gradient, loss)`` of entries with error ``prob`` and cross entropy ``loss``.

    ``prob`` is the distance of the score from its hard target, so ``d loss / d logit = prob``
    (in size) and ``d prob / d logit = prob (1 - prob)``; hence the gradient of
    ``prob^γ loss`` is ``prob^γ (prob + γ (1 - prob) loss)``.
    """
    if gamma is None:
        return prob, loss
    factor = prob.pow(gamma)
    return factor * (prob + gamma * (1 - prob) * loss), factor * loss


class _WeightedSigmoidLoss(Function):
    """Sum of the loss, its closed-form gradient and the column sums of |gradient| in one pass."""

    @staticmethod
    def forward(ctx, z, label, row_weight, terms, num_fg):
        need_grad = ctx.needs_input_grad[0]
        loss, grad, pos, neg = _pass(z, label, row_weight, terms, num_fg, need_grad)
        if need_grad:
            ctx.save_for_backward(z, label, row_weight)
            ctx.terms, ctx.num_fg = terms, num_fg
            ctx.grad = grad
        ctx.mark_non_differentiable(pos, neg)
        return loss, pos, neg

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _pos, _neg):
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # a second backward over a retained graph
            grad = _pass(*ctx.saved_tensors, ctx.terms, ctx.num_fg, True)[1]
        # In place: this function owns the tensor, and a copy would double the peak memory.
        return grad.mul_(grad_loss).to(ctx.saved_tensors[0].dtype), None, None, None, None


class _Positives:
    """What the positive entry of each row contributes, for all rows at once, (N,) each."""

    def __init__(self, z, label, row_weight, terms, is_fg):
        num_columns = z.shape[1]
        self.exists = (label >= 0) & (label < num_columns)
        self.column = label.clamp(0, num_columns - 1)
        self.index = self.column.unsqueeze(1)
        zy = z.gather(1, self.index)[:, 0].to(compute_dtype(z)) * terms.scale
        if terms.shift is not None:
            shift = terms.shift[self.column]
            if terms.shift_bg is not None:
                shift = torch.where(is_fg, shift, terms.shift_bg[self.column])
            zy = zy + shift
        gamma = terms.gamma[self.column] if isinstance(terms.gamma, Tensor) else terms.gamma
        grad, loss = _focal(torch.sigmoid(-zy), F.softplus(-zy), gamma)
        weight = terms.pos_weight[self.column] * self.exists
        if row_weight is not None:
            weight = weight * row_weight
        self.loss = weight @ loss
        self.grad = weight * grad
        # What the entry holds as a negative: nothing where it is positive. Taken out before the
        # sums over columns, not afterwards: the difference of two large sums would cost digits.
        self.rest = torch.stack([torch.sigmoid(zy), F.softplus(zy)]).masked_fill(self.exists, 0)
        self.rest = self.rest.unsqueeze(2)


def _negative_weights(terms, is_fg, row_weight, dtype):
    """``(kinds, weights)``, (R, N) and (R, K): negative entries weigh ``kinds.T @ weights``."""
    if terms.neg_weight_bg is None:
        rows = torch.ones_like(is_fg, dtype=dtype) if row_weight is None else row_weight
        return rows.unsqueeze(0), terms.neg_weight.unsqueeze(0)
    kinds = torch.stack([is_fg, ~is_fg]).to(dtype)
    kinds = kinds if row_weight is None else kinds * row_weight
    return kinds, torch.stack([terms.neg_weight, terms.neg_weight_bg])


def _pass(z, label, row_weight, terms, num_fg, need_grad):
    dtype = compute_dtype(z)
    is_fg = (label >= 0) & (label < num_fg)
    own = _Positives(z, label, row_weight, terms, is_fg)
    kinds, weights = _negative_weights(terms, is_fg, row_weight, dtype)
    loss_sums, grad_sums = torch.zeros_like(weights), torch.zeros_like(weights)
    grad = torch.empty_like(z, dtype=grad_dtype(z)) if need_grad else None
    in_place = need_grad and grad.dtype == dtype
    for start, end in row_blocks(z):
        block = slice(start, end)
        zb = _logits(z[block].to(dtype), terms, is_fg[block])
        # `p` becomes the gradient of the entries taken as negatives, `soft` is their loss.
        p = torch.sigmoid(zb, out=grad[block]) if in_place else torch.sigmoid(zb)
        soft = F.softplus(zb)
        p.scatter_(1, own.index[block], own.rest[0, block])
        soft.scatter_(1, own.index[block], own.rest[1, block])
        if terms.gamma is not None:
            p, soft = _focal(p, soft, terms.gamma)
        if terms.gate is not None:
            p, soft = p.mul_(terms.gate[block]), soft.mul_(terms.gate[block])
        # Sums over rows as products with a matrix of one or two rows.
        loss_sums.addmm_(kinds[:, block], soft)
        grad_sums.addmm_(kinds[:, block], p)
        del soft  # before the next temporary
        if need_grad:
            if terms.neg_weight_bg is not None:
                p.mul_(kinds[:, block].T @ weights)
            else:
                p.mul_(weights)
                if row_weight is not None:
                    p.mul_(row_weight[block].unsqueeze(1))
            if not in_place or terms.gamma is not None:
                grad[block] = p
    loss = own.loss + (loss_sums * weights).sum()
    neg = (grad_sums * weights).sum(0)
    pos = torch.zeros_like(neg).index_add_(0, own.column, own.grad)
    if need_grad:
        rest = grad.gather(1, own.index)
        positive = torch.where(own.exists, -own.grad, rest[:, 0].to(dtype)).to(grad.dtype)
        grad.scatter_(1, own.index, positive.unsqueeze(1))
    if terms.scale != 1.0:
        pos, neg = pos * abs(terms.scale), neg * abs(terms.scale)
        if need_grad:
            grad.mul_(terms.scale)
    return loss, grad, pos, neg


def sigmoid_terms_loss(
    z: Tensor,
    label: Tensor,
    terms: SigmoidTerms,
    row_weight: Tensor | None = None,
    num_fg: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss of integer labels with a closed-form gradient.

    No (N, K) target exists, and the gradient is the only (N, K) tensor that is allocated.

    Args:
        z: Logits, (N, K), any floating dtype; computed in float32 (float64 stays).
        label: Positive column of each row, (N,) int64; outside ``[0, K)``: none.
        terms: The method.
        row_weight: ``s_i``, (N,).
        num_fg: ``C``, to tell foreground rows; ``K`` by default.

    Returns:
        ``(loss, pos_grad, neg_grad)``: the sum, 0-d with gradient, and the column sums of
        ``|dL/dz|`` over positive and over negative entries, (K,) each, without gradient.
    """
    dtype = compute_dtype(z)
    row_weight = None if row_weight is None else row_weight.detach().to(dtype)
    num_fg = z.shape[1] if num_fg is None else num_fg
    return _WeightedSigmoidLoss.apply(z, label, row_weight, terms.cast(dtype), num_fg)


def weighted_sigmoid_loss(
    z: Tensor,
    label: Tensor,
    pos_weight: Tensor,
    neg_weight_fg: Tensor,
    neg_weight_bg: Tensor | None = None,
    row_weight: Tensor | None = None,
    num_fg: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`sigmoid_terms_loss` for methods that only weight entries."""
    terms = SigmoidTerms(pos_weight, neg_weight_fg, neg_weight_bg)
    return sigmoid_terms_loss(z, label, terms, row_weight, num_fg)


class _SigmoidEntries(Function):
    """Loss of every entry; its closed form has no 0 * inf where autograd's chain rule has one."""

    @staticmethod
    def forward(ctx, z, target, weight, gamma):
        bce = F.binary_cross_entropy_with_logits(z, target, reduction='none')
        # p - t without cancellation at hard targets
        error = (1 - target) * torch.sigmoid(z) - target * torch.sigmoid(-z)
        if gamma is None:
            grad = weight * error
            loss = weight * bce
        else:
            size = error.abs()
            factor = size.pow(gamma)
            slope = torch.sigmoid(z) * torch.sigmoid(-z)
            slope = slope / size.clamp_min(torch.finfo(z.dtype).tiny) * error.sign()
            grad = weight * factor * (error + gamma * slope * bce)
            loss = weight * factor * bce
        ctx.save_for_backward(grad)
        size = grad.abs()
        ctx.mark_non_differentiable(size)
        return loss, size

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _size):
        return ctx.saved_tensors[0] * grad_loss, None, None, None


def sigmoid_terms_entries(
    z: Tensor,
    target: Tensor,
    is_fg: Tensor,
    terms: SigmoidTerms,
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of every entry, for soft targets, entry weights and ``reduction='none'``.

    Args:
        z: Logits, (N, K).
        target: In [0, 1], (N, K).
        is_fg: Foreground rows, bool (N,).
        terms: The method; the entry weight is ``t pos_weight + (1 - t) neg_weight``.
        weight: Further factor, broadcastable to (N, K).

    Returns:
        ``(entries, |d entries / dz|)``, both (N, K), the second without gradient.
    """
    dtype = compute_dtype(z)
    terms, target = terms.cast(dtype), target.detach().to(dtype)
    negative = terms.neg_weight
    if terms.neg_weight_bg is not None:
        negative = torch.where(is_fg.unsqueeze(1), negative, terms.neg_weight_bg)
    entry_weight = terms.pos_weight * target + negative * (1 - target)
    if terms.gate is not None:
        entry_weight = entry_weight * (terms.gate | (target > 0))
    if weight is not None:
        entry_weight = entry_weight * weight.detach().to(dtype)
    logits = _logits(z.to(dtype), terms, is_fg)
    entries, size = _SigmoidEntries.apply(logits, target, entry_weight, terms.gamma)
    return entries, size * abs(terms.scale)


def sigmoid_loss_entries(z: Tensor, target: Tensor, entry_weight: Tensor | float = 1.0) -> Tensor:
    """``w_ij * BCE(z_ij, t_ij)`` of every entry, (N, K), differentiable by autograd."""
    dtype = compute_dtype(z)
    entries = F.binary_cross_entropy_with_logits(z.to(dtype), target.to(dtype), reduction='none')
    return entries * entry_weight
