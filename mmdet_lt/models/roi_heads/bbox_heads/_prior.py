"""The bias with which an untrained classifier predicts the share of every class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmdet_lt.models.losses.group_softmax_loss import GroupSoftmaxLoss


def share_logits(loss: nn.Module, share: Tensor, foreground: float, num_columns: int) -> Tensor:
    """Logits, the same for every row, whose activations are the shares of the targets.

    A sigmoid column gets the share of the rows it is the target of, a softmax the shares of its
    columns. Without weights and adjustments of the logits no other constants have a smaller loss.

    Args:
        loss: Classification loss of an RoI head that knows its class count.
        share: Share of each class among foreground rows, float64 (C,), all above 0, sum 1.
        foreground: Share of foreground among all rows, in (0, 1).
        num_columns: K, the width of the classifier.

    Returns:
        float32, (K,).
    """
    ends = share.new_tensor([foreground, 1 - foreground])
    if isinstance(loss, GroupSoftmaxLoss):
        return _grouped(loss, share, ends).float()
    columns = torch.cat([share * foreground, ends[1:]])
    if getattr(loss, 'sigmoid', False):
        return _inverse(loss.link, columns[:num_columns]).float()
    if num_columns == len(share) + 2:  # Seesaw: classes, then foreground against background
        columns = torch.cat([share, ends])
    return (columns.log() / getattr(loss, 'scale', 1.0)).float()


def _grouped(loss: GroupSoftmaxLoss, share: Tensor, ends: Tensor) -> Tensor:
    """Each group sees ``beta`` rows of others for each row of its members."""
    group, column = loss.class_group.long().cpu(), loss.class_column.long().cpu()
    total = share.new_zeros(loss.num_groups).index_add_(0, group, share)
    beta = max(loss.beta, 1e-6)
    logits = share.new_full((sum(loss.group_sizes),), beta / (1 + beta)).log()
    logits[column] = (share / total[group] / (1 + beta)).log()
    logits[-2:] = ends.log()
    return logits


def _inverse(link: Callable[[Tensor], Tensor], score: Tensor) -> Tensor:
    """``z`` with ``link(z) = score`` for an increasing link, by halving an interval."""
    low, high = torch.full_like(score, -100.0), torch.full_like(score, 100.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = link(middle) < score
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
