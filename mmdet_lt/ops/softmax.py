r"""The softmax engine: cross entropy of adjusted logits for the whole softmax family.

.. math::
    \ell_i = \mathrm{CE}(x_i, y_i) = \log\sum_k e^{x_{ik}} - x_{i y_i}, \qquad x_i = a z_i + b(i)

The adjustment ``b`` carries no gradient. It is one vector for all rows (Balanced Softmax, logit
adjustment), differs at the label (LDAM) or depends on label and scores (Seesaw).

Letters: ``N`` rows, ``K`` columns of logits. ``label`` (N,) int64 in ``[0, K)``; rows with a label
outside have loss 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mmdet_lt.ops.sigmoid import compute_dtype, grad_dtype, row_blocks

#: ``adjust(z, label)`` gets a block of scaled logits (n, K) in computing precision, which it may
#: overwrite, and its labels (n,) clamped to [0, K); it returns the adjusted logits (n, K).
Adjustment = Callable[[Tensor, Tensor], Tensor]


class _SoftmaxLoss(Function):
    """Cross entropy of every row; the gradient is the only (N, K) tensor that is allocated."""

    @staticmethod
    def forward(ctx, z, label, adjust, scale):
        need_grad = ctx.needs_input_grad[0]
        loss, grad = _pass(z, label, adjust, scale, need_grad)
        if need_grad:
            ctx.save_for_backward(z, label)
            ctx.adjust, ctx.scale = adjust, scale
            ctx.grad = grad
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad, ctx.grad = ctx.grad, None
        if grad is None:  # a second backward over a retained graph
            grad = _pass(*ctx.saved_tensors, ctx.adjust, ctx.scale, True)[1]
        # In place: this function owns the tensor, and a copy would double the peak memory.
        grad = grad.mul_(grad_loss.to(grad.dtype).unsqueeze(1))
        return grad.to(ctx.saved_tensors[0].dtype), None, None, None


def _pass(z, label, adjust, scale, need_grad):
    dtype = compute_dtype(z)
    num_columns = z.shape[1]
    loss = z.new_empty(len(z), dtype=dtype)
    grad = torch.empty_like(z, dtype=grad_dtype(z)) if need_grad else None
    for start, end in row_blocks(z):
        x = z[start:end].to(dtype, copy=True)
        yb = label[start:end]
        inside = (yb >= 0) & (yb < num_columns)
        column = yb.clamp(0, num_columns - 1)
        if scale != 1.0:
            x.mul_(scale)
        if adjust is not None:
            x = adjust(x, column)
        index = column.unsqueeze(1)
        # log sum exp = max - log(softmax at the maximum); that softmax is at least 1 / K.
        top, where = x.max(1, keepdim=True)
        p = torch.softmax(x, 1)
        log_sum = top - p.gather(1, where).log()
        loss[start:end] = ((log_sum - x.gather(1, index))[:, 0]).masked_fill(~inside, 0)
        if need_grad:
            p.scatter_add_(1, index, -torch.ones_like(log_sum))
            p.masked_fill_(~inside.unsqueeze(1), 0)
            grad[start:end] = p if scale == 1.0 else p.mul_(scale)
    return loss, grad


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
        return _SoftmaxLoss.apply(z, label, lambda x, _: x.add_(vector), scale)
    return _SoftmaxLoss.apply(z, label, adjust, scale)


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
