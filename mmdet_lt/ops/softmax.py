r"""The softmax engine: cross entropy of adjusted logits for the whole softmax family.

.. math::
    \ell_i = \mathrm{CE}(x_i, y_i) = \log\sum_k e^{x_{ik}} - x_{i y_i}, \qquad x_i = a z_i + b(i)

The adjustment ``b`` carries no gradient. It is one vector for all rows (Balanced Softmax, logit
adjustment), differs at the label (LDAM) or depends on label and scores (Seesaw).

Letters: ``N`` rows, ``K`` columns of logits. ``label`` (N,) int64 in ``[0, K)``; rows with a label
outside have loss 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mmdet_lt.ops.sigmoid import compute_dtype, grad_dtype, row_blocks

#: ``adjust(z, label)`` gets a block of scaled logits (n, K) in computing precision, which it may
#: overwrite, and its labels (n,) clamped to [0, K); it returns the adjusted logits (n, K).
Adjustment = Callable[[Tensor, Tensor], Tensor]


class _SoftmaxLoss(Function):
    """Cross entropies of every row, (N, G), one for each group of neighbouring columns.

    The gradient is the only (N, K) tensor that is allocated.
    """

    @staticmethod
    def forward(ctx, z, labels, sizes, adjusts, scale):
        need_grad = ctx.needs_input_grad[0]
        loss, grad = _pass(z, labels, sizes, adjusts, scale, need_grad)
        if need_grad:
            ctx.save_for_backward(z, labels)
            ctx.rest = (sizes, adjusts, scale)
            ctx.grad = grad
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # a second backward over a retained graph
            grad = _pass(*ctx.saved_tensors, *ctx.rest, True)[1]
        # In place: this function owns the tensor, and a copy would double the peak memory.
        for group, part in enumerate(grad.split(ctx.rest[0], 1)):
            part.mul_(grad_loss[:, group : group + 1].to(grad.dtype))
        return grad.to(ctx.saved_tensors[0].dtype), None, None, None, None


def _pass(z, labels, sizes, adjusts, scale, need_grad):
    loss = z.new_empty(labels.shape, dtype=compute_dtype(z))
    grad = torch.empty_like(z, dtype=grad_dtype(z)) if need_grad else None
    grads = grad.split(sizes, 1) if need_grad else [None] * len(sizes)
    for group, (part, out) in enumerate(zip(z.split(sizes, 1), grads, strict=True)):
        _pass_group(part, labels[:, group], adjusts[group], scale, loss[:, group], out)
    return loss, grad


def log_sum_exp(x: Tensor, p: Tensor) -> Tensor:
    """``log sum exp`` of the rows of ``x``, (n, 1), from their softmax ``p``.

    It is the maximum minus the logarithm of its softmax, which is at least 1 / K.
    """
    return x.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()


def _pass_group(z, label, adjust, scale, loss, grad):
    """Write the losses (N,) and the gradient (N, k) of one softmax."""
    dtype = compute_dtype(z)
    index = label.clamp(0, z.shape[1] - 1).unsqueeze(1)
    for start, end in row_blocks(z):
        block = slice(start, end)
        x = z[block].to(dtype, copy=adjust is not None or scale != 1.0).contiguous()
        if scale != 1.0:
            x.mul_(scale)
        if adjust is not None:
            x = adjust(x, index[block, 0])
        p = torch.softmax(x, 1)
        row_loss = log_sum_exp(x, p) - x.gather(1, index[block])
        loss[block] = row_loss[:, 0]
        if grad is not None:
            p.scatter_add_(1, index[block], -torch.ones_like(row_loss))
            grad[block] = p if scale == 1.0 else p.mul_(scale)
        del x, p  # before those of the next block


def _losses(z, labels, sizes, adjusts, scale):
    loss = _SoftmaxLoss.apply(z, labels, sizes, adjusts, scale)
    outside = torch.stack(
        [(y < 0) | (y >= size) for y, size in zip(labels.T, sizes, strict=True)], 1
    )
    # Its backward pass zeroes the gradient of these rows, too.
    return loss.masked_fill(outside, 0)


def softmax_loss(
    z: Tensor,
    label: Tensor,
    adjust: Tensor | Adjustment | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Cross entropy of adjusted logits with a closed-form gradient.

    Args:
        z: Logits, (N, K), any floating dtype; computed in float32 (float64 stays).
        label: Column of each row, (N,) int64; outside ``[0, K)`` the row's loss is 0.
        adjust: Vector (K,) added to the scaled logits, or a function of a block, see
            :data:`Adjustment`. Constant: no gradient flows through it.
        scale: Factor of the logits.

    Returns:
        Loss of each row, (N,), with gradient.
    """
    if isinstance(adjust, Tensor):
        vector = adjust.detach().to(compute_dtype(z))
        adjust = lambda x, _: x.add_(vector)  # noqa: E731
    return _losses(z, label.unsqueeze(1), [z.shape[1]], [adjust], scale)[:, 0]


def grouped_softmax_loss(
    z: Tensor,
    labels: Tensor,
    sizes: list[int],
    adjusts: Sequence[Adjustment | None] | None = None,
) -> Tensor:
    """One cross entropy for each group of neighbouring columns, with one gradient of (N, K).

    Args:
        z: Logits, (N, K).
        labels: Column of each row within each of G groups, (N, G) int64; outside ``[0, size)``
            the loss is 0.
        sizes: Columns of each group, G numbers whose sum is K.
        adjusts: Adjustment of each group.

    Returns:
        Losses, (N, G), with gradient.
    """
    return _losses(z, labels, list(sizes), adjusts or [None] * len(sizes), 1.0)


def soft_softmax_loss(
    z: Tensor,
    target: Tensor,
    adjust: Tensor | Adjustment | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``-sum_j t_ij log softmax(a z_i + b(i))_j`` for soft targets, (N,), by autograd.

    Args:
        z: Logits, (N, K).
        target: Weights of the columns, (N, K), at least 0; need not sum to 1.
        adjust: As in :func:`softmax_loss`; the label it gets is the column of the largest target.
        scale: Factor of the logits.
    """
    x = z.to(compute_dtype(z)) * scale
    target = target.detach().to(x.dtype)
    if isinstance(adjust, Tensor):
        x = x + adjust.detach().to(x.dtype)
    elif adjust is not None:
        with torch.no_grad():
            shift = adjust(x.detach().clone(), target.argmax(1)) - x.detach()
        x = x + shift
    log_p = torch.log_softmax(x, 1)
    # A column with target 0 may have probability 0 (shift -inf); 0 * -inf would be NaN.
    return -(target * log_p.masked_fill(target == 0, 0)).sum(1)


def soft_grouped_softmax_loss(
    z: Tensor,
    target: Tensor,
    sizes: list[int],
    adjusts: Sequence[Adjustment | None] | None = None,
) -> Tensor:
    """:func:`grouped_softmax_loss` for soft targets of all columns, (N, K), by autograd."""
    adjusts = adjusts or [None] * len(sizes)
    parts = zip(z.split(sizes, 1), target.split(sizes, 1), adjusts, strict=True)
    return torch.stack([soft_softmax_loss(*part) for part in parts], 1)
