"""No sampling: every proposal that the assigner does not ignore is trained on."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers import BaseSampler
from torch import Tensor

from mmdet_lt.registry import TASK_UTILS


@TASK_UTILS.register_module()
class AllSampler(BaseSampler):
    """Keep all proposals, and the ground truth boxes as proposals.

    MMDetection's ``PseudoSampler`` adds no ground truth boxes, without which an RoI head has hardly
    any positive row as long as the RPN is untrained. ``avg_factor`` counts positives and negatives,
    as with the other samplers of RoI heads.

    Args:
        add_gt_as_proposals: Append the ground truth boxes.
    """

    def __init__(self, add_gt_as_proposals: bool = True, **kwargs: Any) -> None:
        # Heads pass their own context and lengths; nothing is drawn, so none is needed.
        super().__init__(-1, -1.0, add_gt_as_proposals=add_gt_as_proposals)

    def _sample_pos(self, assign_result: AssignResult, num_expected: int, **kwargs: Any) -> Tensor:
        return torch.nonzero(assign_result.gt_inds > 0).squeeze(-1)

    def _sample_neg(self, assign_result: AssignResult, num_expected: int, **kwargs: Any) -> Tensor:
        return torch.nonzero(assign_result.gt_inds == 0).squeeze(-1)
