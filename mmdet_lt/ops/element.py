r"""Sums over entries for losses of the sigmoid family that are not a (focal) cross entropy.

.. math::
    L = \sum_i s_i \sum_j w_{ij}\, \ell(z_{ij}, t_{ij})

``l`` is any element function that knows its own derivative, so that the gradient is the only
(N, K) tensor that is allocated. The entry weights ``w`` are those of :class:`SigmoidTerms`; its
gamma, shift and scale belong to the cross entropy and are not read here.

Letters: ``N`` rows, ``K`` columns of logits, ``C <= K`` foreground classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mmdet_lt.ops.sigmoid import SigmoidTerms, compute_dtype, grad_dtype, row_blocks

#: ``element(z, t)`` gets logits and targets of one shape, in computing precision, and returns
#: ``(l, dl/dz)`` of that shape.
Element = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def element_blocks(
    z: Tensor, label: Tensor, target: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows: ``(rows, logits, targets)``, both (n, K) in computing precision.

    Args:
        z: Logits, (N, K).
        label: Positive column of each row, (N,) int64; outside ``[0, K)``: none.
        target: Targets, (N, K), in place of labels.
    """
    dtype, num_columns = compute_dtype(z), z.shape[1]
    for start, end in row_blocks(z):
        part = slice(start, end)
        block = z[part].to(dtype)
        if target is not None:
            yield part, block, target[part].to(dtype)
            continue
        column = label[part].unsqueeze(1)
        inside = (column >= 0) & (column < num_columns)
        hot = torch.zeros_like(block)
        yield part, block, hot.scatter_(1, column.clamp(0, num_columns - 1), inside.to(dtype))


def _entry_weight(
    target: Tensor,
    is_fg: Tensor,
    terms: SigmoidTerms,
    gate: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """``s_i w_ij``, (n, K)."""
    negative = terms.neg_weight
    if terms.neg_weight_bg is not None:
        kinds = torch.stack([terms.neg_weight_bg, negative])
        negative = kinds.index_select(0, is_fg.long())
    entry = terms.pos_weight * target + negative * (1 - target)
    if gate is not None:
        entry = entry * (gate | (target > 0))
    return entry if weight is None else entry * weight


class _ElementSum(Function):
    """Sum of the weighted loss; the gradient is made in the same pass."""

    @staticmethod
    def forward(ctx, z, label, target, is_fg, weight, terms, element):
        need_grad = ctx.needs_input_grad[0]
        loss, grad = _pass(z, label, target, is_fg, weight, terms, element, need_grad)
        if need_grad:
            ctx.save_for_backward(z, label, target, is_fg, weight)
            ctx.terms, ctx.element = terms, element
            ctx.grad = grad
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # a second backward over a retained graph
            grad = _pass(*ctx.saved_tensors, ctx.terms, ctx.element, True)[1]
        # In place: this function owns the tensor, and a copy would double the peak memory.
        grad = grad.mul_(grad_loss).to(ctx.saved_tensors[0].dtype)
        return grad, None, None, None, None, None, None


def _pass(z, label, target, is_fg, weight, terms, element, need_grad):
    loss = z.new_zeros((), dtype=compute_dtype(z))
    grad = torch.empty_like(z, dtype=grad_dtype(z)) if need_grad else None
    for part, zb, tb in element_blocks(z, label, target):
        gate = None if terms.gate is None else terms.gate[part]
        row = None if weight is None else weight[part]
        entry = _entry_weight(tb, is_fg[part], terms, gate, row)
        value, slope = element(zb, tb)
        loss = loss + (entry * value).sum()
        if need_grad:
            grad[part] = entry * slope
    return loss, grad


class _ElementEntries(Function):
    """The weighted loss of every entry."""

    @staticmethod
    def forward(ctx, z, target, weight, element):
        value, slope = element(z, target)
        ctx.save_for_backward(weight * slope)
        return weight * value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return ctx.saved_tensors[0] * grad_loss, None, None, None


def _constants(
    z: Tensor, target: Tensor | None, terms: SigmoidTerms, weight: Tensor | None
) -> tuple[Tensor | None, SigmoidTerms, Tensor | None]:
    """Detached, in computing precision; the weight broadcastable to (N, K)."""
    dtype = compute_dtype(z)
    target = None if target is None else target.detach().to(dtype)
    if weight is not None:
        weight = weight.detach().to(dtype)
        weight = weight if weight.dim() == 2 else weight.unsqueeze(1)
    return target, terms.cast(dtype), weight


def element_loss(
    z: Tensor,
    label: Tensor,
    is_fg: Tensor,
    terms: SigmoidTerms,
    element: Element,
    weight: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Summed loss of an element function.

    Args:
        z: Logits, (N, K), any floating dtype; computed in float32 (float64 stays).
        label: Positive column of each row, (N,) int64; outside ``[0, K)``: none.
        is_fg: Foreground rows, bool (N,).
        terms: Entry weights and gate.
        element: The element function.
        weight: Further factor, (N,) or (N, K).
        target: Soft targets in [0, 1], (N, K), in place of labels.

    Returns:
        The sum, 0-d, with gradient.
    """
    target, terms, weight = _constants(z, target, terms, weight)
    return _ElementSum.apply(z, label, target, is_fg, weight, terms, element)


def element_entries(
    z: Tensor,
    target: Tensor,
    is_fg: Tensor,
    terms: SigmoidTerms,
    element: Element,
    weight: Tensor | None = None,
) -> Tensor:
    """Loss of every entry, (N, K), with gradient; arguments as in :func:`element_loss`."""
    target, terms, weight = _constants(z, target, terms, weight)
    entry = _entry_weight(target, is_fg, terms, terms.gate, weight)
    return _ElementEntries.apply(z.to(compute_dtype(z)), target, entry, element)
