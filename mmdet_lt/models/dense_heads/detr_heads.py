"""Heads of the DETR family whose matching, test scores and statistics follow the loss.

What counts for running statistics: the queries of every decoder layer. Denoising queries,
proposals of the encoder and dense auxiliary queries are trained with the loss but not counted:
their classes occur as often as the recipe repeats them, not as often as the detector meets them.
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.dense_heads import (
    ConditionalDETRHead,
    DABDETRHead,
    DDQDETRHead,
    DeformableDETRHead,
    DETRHead,
    DINOHead,
)
from mmdet.models.task_modules.assigners.match_cost import ClassificationCost, FocalLossCost
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.head_scores import (
    FollowsLoss,
    copy_config,
    sigmoid_logits,
    softmax_logits,
    stock_logits,
    uncounted,
)
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.losses.focal_loss import logit_of_score
from mmdet_lt.registry import MODELS


class MatchesByLoss(FollowsLoss):
    """Mixin: the matcher's class cost and the test scores are those of the loss."""

    _match_by_sigmoid = False

    def check_matcher(self, assigner: Any) -> None:
        """Raise InputError where the matcher's class cost cannot take the loss's scores."""
        costs = getattr(assigner, 'match_costs', ())
        if self.loss_cls.sigmoid and any(isinstance(cost, ClassificationCost) for cost in costs):
            raise InputError(
                f'{self.loss_cls.name} is a sigmoid loss, the matcher of {type(self).__name__} '
                'takes a softmax: write `FocalLossCost` in place of `ClassificationCost` in '
                '`train_cfg.assigner.match_costs`.'
            )
        self._match_by_sigmoid = any(
            isinstance(cost, FocalLossCost) and not cost.binary_input  # those compare masks
            for cost in costs
        )

    def matching_logits(self, z: Tensor) -> Tensor:
        """Logits from which the matcher computes the scores of the loss."""
        if not isinstance(self.loss_cls, LongTailLoss):
            return z
        # FocalLossCost takes logarithms of scores: no infinities.
        if self._match_by_sigmoid:
            return sigmoid_logits(self.loss_cls, z).clamp(-50, 50)
        return softmax_logits(self.loss_cls, z)


class LTDETRMixin(MatchesByLoss):
    """:class:`MatchesByLoss` for the classes below :class:`DETRHead`.

    ``class_weight`` of a softmax loss may be a list of C + 1 with background last; its last number
    is then the weight of an unmatched query in the divisor as well, as ``bg_cls_weight`` of
    :class:`DETRHead` is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # DETRHead writes into the config of its loss.
        if 'loss_cls' in kwargs:
            kwargs['loss_cls'] = copy_config(kwargs['loss_cls'])
        super().__init__(*args, **kwargs)
        self.check_loss()
        self.check_width(self.cls_out_channels)
        self.check_matcher(getattr(self, 'assigner', None))
        weight = self.loss_cls.class_weight
        if not self.loss_cls.sigmoid and isinstance(weight, (list, tuple)):
            self.bg_cls_weight = float(weight[-1]) if len(weight) > self.num_classes else 1.0

    def get_targets(self, cls_scores_list: list[Tensor], *args: Any, **kwargs: Any):
        scores = [self.matching_logits(scores.detach()) for scores in cls_scores_list]
        return super().get_targets(scores, *args, **kwargs)

    def _predict_by_feat_single(self, cls_score: Tensor, *args: Any, **kwargs: Any):
        cls_score = stock_logits(self.loss_cls, cls_score)
        return super()._predict_by_feat_single(cls_score, *args, **kwargs)


@MODELS.register_module()
class LTDETRHead(LTDETRMixin, DETRHead):
    """:class:`DETRHead`; takes its arguments; ``bg_cls_weight`` is ``class_weight[-1]`` here."""


@MODELS.register_module()
class LTConditionalDETRHead(LTDETRMixin, ConditionalDETRHead):
    """:class:`ConditionalDETRHead`; takes its arguments."""


@MODELS.register_module()
class LTDABDETRHead(LTDETRMixin, DABDETRHead):
    """:class:`DABDETRHead`; takes its arguments."""


@MODELS.register_module()
class LTDeformableDETRHead(LTDETRMixin, DeformableDETRHead):
    """:class:`DeformableDETRHead` with a class-agnostic loss for the proposals of its encoder.

    With ``as_two_stage`` the stock head trains the encoder with ``loss_cls`` and label 0 for every
    object: a long-tail loss would treat them by the frequency of class 0, and count them as such.

    Args:
        loss_enc: Loss of the encoder's proposals, whose column 0 says object or not.
        kwargs: Arguments of :class:`DeformableDETRHead`.

    Raises:
        InputError: The loss does not fit; a softmax loss with ``as_two_stage``, whose detector
            picks proposals by the logit of column 0 alone.
    """

    def __init__(self, *args: Any, loss_enc: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.as_two_stage:
            return
        if not self.loss_cls.sigmoid:
            raise InputError(
                f'{self.loss_cls.name} is a softmax loss, the two-stage Deformable DETR picks '
                'proposals by one logit of a sigmoid: set `model.as_two_stage=False`.'
            )
        default = dict(type='mmdet_lt.FocalLoss', use_sigmoid=True, loss_weight=2.0)
        self.loss_enc = MODELS.build(loss_enc or default)

    def loss_by_feat(
        self, scores: Tensor, boxes: Tensor, enc_scores: Tensor | None, enc_boxes: Any, *args: Any
    ) -> dict[str, Tensor]:
        losses = super().loss_by_feat(scores, boxes, None, None, *args)
        if enc_scores is None:
            return losses
        gt_instances, metas = args[0], args[1]
        objects = [item.clone() for item in gt_instances]
        for item in objects:
            item.labels = torch.zeros_like(item.labels)
        loss_cls, self.loss_cls = self.loss_cls, self.loss_enc
        try:
            found = self.loss_by_feat_single(enc_scores, enc_boxes, objects, metas)
        finally:
            self.loss_cls = loss_cls
        return {**losses, **_encoder_losses(found)}


class _Denoising(LTDETRMixin):
    """Encoder and denoising queries of DINO are trained, not counted."""

    takes_softmax = False
    softmax_reason = 'its detector picks proposals by the largest logit, which may be background'
    softmax_head = 'mmdet_lt.LTDeformableDETRHead'

    def loss_by_feat(
        self, scores: Tensor, boxes: Tensor, enc_scores: Tensor | None, enc_boxes: Any, *args: Any
    ) -> dict[str, Tensor]:
        losses = super().loss_by_feat(scores, boxes, None, None, *args)
        if enc_scores is None:
            return losses
        with uncounted(self.loss_cls):
            found = self.loss_by_feat_single(enc_scores, enc_boxes, args[0], args[1])
        return {**losses, **_encoder_losses(found)}

    def loss_dn(self, *args: Any, **kwargs: Any):
        with uncounted(self.loss_cls):
            return super().loss_dn(*args, **kwargs)


@MODELS.register_module()
class LTDINOHead(_Denoising, DINOHead):
    """:class:`DINOHead`; takes its arguments. Sigmoid losses only."""


class _OnScores(nn.Module):
    """The loss for code that hands it sigmoids in place of logits; never counted."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self._loss = (loss,)  # in a tuple: the head's checkpoint holds the loss already

    def forward(self, score: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loss = self._loss[0]
        with uncounted(loss):
            return loss(logit_of_score(score), *args, **kwargs)


@MODELS.register_module()
class LTDDQDETRHead(_Denoising, DDQDETRHead):
    """:class:`DDQDETRHead`; takes its arguments. Sigmoid losses only.

    The dense auxiliary queries, for which DDQ fixes its own quality focal loss, are trained with
    ``loss_cls`` on (label, alignment) targets as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.aux_loss_for_dense.loss_cls = _OnScores(self.loss_cls)


def _encoder_losses(found: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    names = ('enc_loss_cls', 'enc_loss_bbox', 'enc_loss_iou')
    return dict(zip(names, found, strict=True))
