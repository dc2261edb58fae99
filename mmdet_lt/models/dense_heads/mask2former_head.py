"""Mask2Former for every loss of this package that fits a dense head."""

from __future__ import annotations

from typing import Any

from mmdet.models.dense_heads import Mask2FormerHead
from mmdet.models.seg_heads.panoptic_fusion_heads import MaskFormerFusionHead
from mmdet.structures.mask import mask2bbox
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmdet_lt.models.dense_heads.detr_heads import MatchesByLoss
from mmdet_lt.models.layers.head_scores import class_scores, copy_config
from mmdet_lt.registry import MODELS


@MODELS.register_module()
class LTMask2FormerHead(MatchesByLoss, Mask2FormerHead):
    """:class:`Mask2FormerHead` with the width, the divisor and the scores of the loss.

    The classifier has the columns that the loss needs, C or C + 1. ``loss_cls.class_weight`` may be
    left out; a list of C + 1, background last, is used as in :class:`Mask2FormerHead`, for rows and
    for the divisor. Sigmoid losses need ``FocalLossCost`` in
    ``train_cfg.assigner.match_costs``. :meth:`predict` gives scores, (N, Q, C), in place of logits:
    use it with ``panoptic_fusion_head=dict(type='mmdet_lt.LTMaskFormerFusionHead')``.

    Args:
        kwargs: Arguments of :class:`Mask2FormerHead`.

    Raises:
        InputError: The loss does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        loss_cls = copy_config(kwargs.pop('loss_cls'))
        loss_cls.setdefault('class_weight', None)
        super().__init__(*args, loss_cls=loss_cls, **kwargs)
        self.check_loss()
        self.check_matcher(getattr(self, 'assigner', None))
        given = loss_cls.class_weight
        if given is None or isinstance(given, (int, float)):
            given = [1.0 if given is None else float(given)] * self.num_classes
        self.class_weight = [*given, 1.0] if len(given) == self.num_classes else list(given)
        columns = self.loss_cls.dense_columns(self.num_classes)
        self.cls_embed = nn.Linear(self.cls_embed.in_features, columns)

    def init_weights(self) -> None:
        super().init_weights()
        bias = self.loss_cls.prior_bias()
        if bias is not None:
            # The stock classifier starts at a softmax; sigmoids must start at few positives.
            nn.init.constant_(self.cls_embed.bias, bias)

    def _get_targets_single(self, cls_score: Tensor, *args: Any, **kwargs: Any):
        seen = self.matching_logits(cls_score.detach())
        return super()._get_targets_single(seen, *args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logits, masks = super().predict(*args, **kwargs)
        return class_scores(self.loss_cls, logits), masks


@MODELS.register_module()
class LTMaskFormerFusionHead(MaskFormerFusionHead):
    """:class:`MaskFormerFusionHead` for :class:`LTMask2FormerHead`, which gives scores.

    ``mask_cls`` is (Q, C) in [0, 1], without a column for background. Arguments are those of
    :class:`MaskFormerFusionHead`.
    """

    def panoptic_postprocess(self, mask_cls: Tensor, mask_pred: Tensor) -> PixelData:
        # The stock code looks at the best column of a softmax only: one that has the best score
        # there, and leaves the rest to background, makes it decide by our scores.
        best, label = mask_cls.max(-1, keepdim=True)
        scores = mask_cls.new_zeros(len(mask_cls), self.num_classes + 1)
        scores = scores.scatter(1, label, best)
        scores[:, -1] = 1 - best[:, 0]
        return super().panoptic_postprocess(scores.log(), mask_pred)

    def instance_postprocess(self, mask_cls: Tensor, mask_pred: Tensor) -> InstanceData:
        number = min(self.test_cfg.get('max_per_image', 100), mask_cls.numel())
        scores, index = mask_cls.flatten().topk(number, sorted=False)
        query, labels = index // self.num_classes, index % self.num_classes
        thing = labels < self.num_things_classes
        masks = mask_pred[query[thing]]
        inside = masks > 0
        area = inside.flatten(1).sum(1)
        mean = (masks.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6)
        return InstanceData(
            bboxes=mask2bbox(inside),
            labels=labels[thing],
            scores=scores[thing] * mean,
            masks=inside,
        )
