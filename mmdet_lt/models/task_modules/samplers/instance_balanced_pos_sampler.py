"""Positives spread evenly over the ground-truth boxes.

Paper: Pang et al., *Libra R-CNN: Towards Balanced Learning for Object Detection*, CVPR 2019,
https://arxiv.org/abs/1904.02701.

MMDetection's sampler of this name draws an equal number for each box and fills up with positives
that were not drawn. It forms the difference of two Python sets of 0-d tensors, which compare by
identity, so nothing is taken away: the fill repeats indices that were drawn before. They are merged
afterwards, and fewer positives remain than were asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers import RandomSampler
from torch import Tensor

from mmdet_lt.registry import TASK_UTILS


def balanced_choice(group: Tensor, num: int) -> Tensor:
    """Indices of ``num`` of the N elements of ``group``, spread evenly over its values, (num,).

    Every value gives its first element before any gives its second, and so on; which element is
    the first, and who goes short in the last round, is random. No index occurs twice.
    """
    order = torch.randperm(len(group), device=group.device)
    by_group = group[order].argsort(stable=True)
    order, values = order[by_group], group[order[by_group]]
    # Turn of an element within its value: distance to the first of equal values.
    turn = torch.arange(len(group), device=group.device) - torch.searchsorted(values, values)
    lot = torch.randperm(len(group), device=group.device)
    return order[(turn * len(group) + lot).argsort()[:num]]


@TASK_UTILS.register_module()
class InstanceBalancedPosSampler(RandomSampler):
    """As many positives of one box as of another, as far as there are enough; negatives at random.

    The arguments are those of MMDetection's ``RandomSampler``. Exactly ``num * pos_fraction``
    positives are chosen where there are that many.
    """

    def _sample_pos(self, assign_result: AssignResult, num_expected: int, **kwargs: Any) -> Tensor:
        positive = torch.nonzero(assign_result.gt_inds > 0, as_tuple=False).flatten()
        if len(positive) <= num_expected:
            return positive
        return positive[balanced_choice(assign_result.gt_inds[positive], num_expected)]
