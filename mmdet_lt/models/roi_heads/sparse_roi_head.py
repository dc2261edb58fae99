"""Sparse R-CNN (and QueryInst) whose matching, start and test scores follow the loss."""

from __future__ import annotations

from typing import Any

from mmdet.models.roi_heads import SparseRoIHead
from mmdet.models.roi_heads.bbox_heads import DIIHead

from mmdet_lt.errors import InputError
from mmdet_lt.models.dense_heads.detr_heads import MatchesByLoss
from mmdet_lt.models.layers.head_scores import stock_logits
from mmdet_lt.registry import MODELS


@MODELS.register_module()
class LTDIIHead(MatchesByLoss, DIIHead):
    """:class:`DIIHead` for losses of this package that fit a dense head; takes its arguments.

    The head has C columns for sigmoid and C + 1 for softmax losses, as dense heads have. Use it
    with ``roi_head=dict(type='mmdet_lt.LTSparseRoIHead')``, which takes the scores of the loss.

    Raises:
        InputError: The loss does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_loss()
        self.check_width(self.fc_cls.out_features)


@MODELS.register_module()
class LTSparseRoIHead(SparseRoIHead):
    """:class:`SparseRoIHead` whose stages are :class:`LTDIIHead`; takes its arguments.

    Each stage has its own loss with its own statistics. The matcher of a stage and the test see
    the scores of the loss.

    Raises:
        InputError: A stage is another head, or its matcher takes a softmax of a sigmoid loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for stage, head in enumerate(self.bbox_head):
            if not isinstance(head, LTDIIHead):
                raise InputError(
                    f'LTSparseRoIHead needs `roi_head.bbox_head[{stage}].type='
                    f"'mmdet_lt.LTDIIHead'`, found {type(head).__name__}."
                )
        for head, assigner in zip(self.bbox_head, getattr(self, 'bbox_assigner', []), strict=False):
            head.check_matcher(assigner)

    def _bbox_forward(self, stage: int, *args: Any, **kwargs: Any) -> dict[str, Any]:
        results = super()._bbox_forward(stage, *args, **kwargs)
        head = self.bbox_head[stage]
        if self.training:
            scores = [head.matching_logits(z) for z in results['detached_cls_scores']]
            results['detached_cls_scores'] = scores
        else:
            results['cls_score'] = stock_logits(head.loss_cls, results['cls_score'])
        return results
