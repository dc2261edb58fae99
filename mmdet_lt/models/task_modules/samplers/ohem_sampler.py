"""Online hard example mining (OHEM) that works with every classification loss.

Paper: Shrivastava et al., *Training Region-based Object Detectors with Online Hard Example Mining*,
CVPR 2016, https://arxiv.org/abs/1604.03540.

MMDetection's sampler asks the head for unreduced losses and ranks what it finds under
``loss_cls``. That fails or ranks nonsense where the loss returns a dict (Seesaw), one value per row
and class (sigmoid losses) or a scalar, and it moves running statistics by rows that are not trained
on. Its rule is kept: the hardest positives and the hardest negatives, chosen apart, without NMS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.task_modules.samplers import OHEMSampler as StockOHEMSampler
from mmdet.structures.bbox import bbox2roi
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.registry import TASK_UTILS


def row_losses(losses: Mapping[str, Any], key: str, num_rows: int) -> Tensor:
    """Loss of each row, (N,), from what a head returned for ``reduction_override='none'``.

    Everything whose name begins with ``key`` counts, in nested dicts, too: (N,) as it is, (N, ...)
    summed over the other axes. A number for all rows, or none (the classes of MMDetection's
    ``SeesawLoss`` among negatives), ranks nothing and is left out.

    Raises:
        InputError: There is no such loss, or one has not a value for every row.
    """
    named = [value for name, value in losses.items() if name.startswith(key)]
    if not named:
        raise InputError(
            f'OHEMSampler found no loss named {key}* in {sorted(losses)}: set its `loss_key`.'
        )
    parts = [row_losses(v, key, num_rows) if isinstance(v, Mapping) else v for v in named]
    of_rows = [part for part in parts if part.dim() and len(part) == num_rows]
    others = [part for part in parts if not part.dim() or len(part) != num_rows]
    if not of_rows or any(part.numel() > 1 for part in others):
        raise InputError(
            "OHEMSampler needs one loss per row from `loss_cls` for reduction 'none', found the "
            f'shapes {[tuple(part.shape) for part in parts]} for {num_rows} rows: use a loss of '
            'mmdet_lt, or mmdet.RandomSampler.'
        )
    return sum(part.detach().float().reshape(num_rows, -1).sum(1) for part in of_rows)


@contextmanager
def untouched_buffers(*modules: nn.Module) -> Iterator[None]:
    """Put every buffer of ``modules`` back at the end, changed in place or replaced."""
    saved = [
        (module, name, buffer, buffer.clone())
        for root in modules
        for module in root.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in saved:
            # Not as a change that autograd sees: graphs that hold the buffer stay valid.
            buffer.data.copy_(value)
            module._buffers[name] = buffer


@TASK_UTILS.register_module()
class OHEMSampler(StockOHEMSampler):
    """Hardest positives and hardest negatives of each image, by classification loss.

    For ``train_cfg.rcnn.sampler``; every other argument is that of MMDetection's ``OHEMSampler``.
    The loss of a row is the sum over its classes and over the parts of the loss. Running
    statistics, those of losses and of batch norm in the head, are left as they were.

    Args:
        num: Rows of an image.
        pos_fraction: Largest share of positives.
        context: The RoI head; it passes itself.
        kwargs: ``neg_pos_ub``, ``add_gt_as_proposals``, ``loss_key``.

    Raises:
        InputError: The context has no box head, as in an RPN or a dense head.
    """

    def __init__(self, num: int, pos_fraction: float, context: Any = None, **kwargs: Any) -> None:
        if getattr(context, 'bbox_head', None) is None:
            raise InputError(
                'OHEMSampler ranks RoIs by the loss of a box head: set it in '
                f'`train_cfg.rcnn.sampler`, found it in {type(context).__name__}.'
            )
        super().__init__(num, pos_fraction, context, **kwargs)

    def hard_mining(
        self, inds: Tensor, num_expected: int, bboxes: Tensor, labels: Tensor, feats: list[Tensor]
    ) -> Tensor:
        """The ``num_expected`` of ``inds`` with the largest loss."""
        context = self.context
        shared = [context.shared_head] if context.with_shared_head else []
        # HTC adds features of its semantic branch to those of the boxes.
        semantic = [context.semantic_head] if getattr(context, 'with_semantic', False) else []
        with torch.no_grad(), untouched_buffers(self.bbox_head, *shared, *semantic):
            rois = bbox2roi([bboxes])
            stage = (context.current_stage,) if hasattr(context, 'num_stages') else ()
            extra = dict(semantic_feat=semantic[0](feats)[1]) if semantic else {}
            results = context._bbox_forward(*stage, feats, rois, **extra)
            cls_score = results['cls_score']
            losses = self.bbox_head.loss(
                cls_score=cls_score,
                bbox_pred=None,
                rois=rois,
                labels=labels,
                label_weights=cls_score.new_ones(len(cls_score)),
                bbox_targets=None,
                bbox_weights=None,
                reduction_override='none',
            )
            return inds[row_losses(losses, self.loss_key, len(inds)).topk(num_expected).indices]
