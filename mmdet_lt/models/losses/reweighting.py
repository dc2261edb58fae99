"""Class weights from counts, which a deferred schedule can switch on later (DRW)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdet_lt.ops.softmax import softmax_loss


class ClassReweighting(nn.Module):
    """Mixin for losses with a weight per class, ``balance_weight`` (C + 1,), background last.

    ``DeferredRebalancingHook`` calls :meth:`set_rebalancing`; while it is off all weights are 1.
    """

    #: Whether the weights apply; a schedule, not a state: the hook sets it again on resume.
    rebalancing = True

    def set_rebalancing(self, active: bool) -> None:
        """Marker method: switch the class weights on or off."""
        self.rebalancing = bool(active)

    def label_weight(self) -> Tensor | None:
        """Weights of the classes, or None while they are off."""
        return self.balance_weight if self.rebalancing else None


def weighted_softmax_loss(z: Tensor, label: Tensor, class_weight: Tensor) -> Tensor:
    """Cross entropy of each row times the weight of its class.

    Args:
        z: Logits, (N, C + 1), background last, any floating dtype.
        label: Class of each row, (N,) int64 in ``[0, C]``.
        class_weight: ``w``, (C + 1,), background last.

    Returns:
        (N,), with gradient.
    """
    return softmax_loss(z, label) * class_weight[label]


def with_background(class_weight: Tensor, value: float = 1.0) -> Tensor:
    """(C + 1,) from (C,): the weight of background appended."""
    return torch.cat([class_weight, class_weight.new_full((1,), value)])
