"""Box heads that MMDetection builds without asking the loss: Double-Head and SABL."""

from __future__ import annotations

from typing import Any

from mmdet.models.layers import multiclass_nms
from mmdet.models.roi_heads.bbox_heads import DoubleConvFCBBoxHead, SABLHead
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.roi_heads.bbox_heads.balanced_bbox_head import BalancedHead
from mmdet_lt.registry import MODELS


class AsksLoss:
    """Mixin: the classifier ``fc_cls`` has the columns the loss asks for.

    Args:
        cls_predictor_cfg: Config of the classifier, which the heads of MMDetection leave unread.
        kwargs: Arguments of MMDetection's head.

    Raises:
        InputError: The loss is of another package.
    """

    follows_loss = True

    def __init__(self, *args: Any, cls_predictor_cfg: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The second question is where BalancedHead adds its column, before the width is asked.
        if not (isinstance(self.loss_cls, LongTailLoss) and self.custom_cls_channels):
            name = type(self).__name__
            raise InputError(
                f'{name} works with losses of mmdet_lt, found {type(self.loss_cls).__name__} in '
                f"`loss_cls`: use `type='{name[2:]}'` for it."
            )
        predictor = dict(cls_predictor_cfg or dict(type='Linear'))
        columns = self.loss_cls.get_cls_channels(self.num_classes)
        predictor.update(in_features=self.fc_cls.in_features, out_features=columns)
        self.fc_cls = MODELS.build(predictor)


@MODELS.register_module()
class LTDoubleConvFCBBoxHead(BalancedHead, AsksLoss, DoubleConvFCBBoxHead):
    """:class:`DoubleConvFCBBoxHead` with as many columns as the loss needs.

    Takes its arguments and those of :class:`BalancedHead`; ``cls_predictor_cfg``, which the stock
    head leaves unread, chooses the classifier. Scores at test are the loss's own in the stock head,
    too.
    """


@MODELS.register_module()
class LTSABLHead(BalancedHead, AsksLoss, SABLHead):
    """:class:`SABLHead` with the columns, the accuracy and the scores of the loss.

    Takes the arguments of :class:`SABLHead` and of :class:`BalancedHead`, and
    ``cls_predictor_cfg``.
    """

    def loss(
        self, cls_score: Tensor | None, bbox_pred: Any, rois: Any, labels: Tensor, *args, **kwargs
    ) -> dict[str, Tensor]:
        losses = super().loss(cls_score, bbox_pred, rois, labels, *args, **kwargs)
        if cls_score is not None:
            losses.update(self.loss_cls.get_accuracy(cls_score, labels))
            if isinstance(losses['loss_cls'], dict):
                losses.update(losses.pop('loss_cls'))
        return losses

    def _predict_by_feat_single(
        self,
        roi: Tensor,
        cls_score: Tensor | list[Tensor],
        bbox_pred: tuple[Tensor, Tensor],
        img_meta: dict,
        rescale: bool = False,
        rcnn_test_cfg: Any = None,
    ) -> InstanceData:
        if isinstance(cls_score, list):
            cls_score = sum(cls_score) / len(cls_score)
        scores = self.loss_cls.get_activation(cls_score)
        boxes, confidence = self.bbox_coder.decode(roi[:, 1:], bbox_pred, img_meta['img_shape'])
        if rescale and len(boxes):
            boxes = boxes / boxes.new_tensor(img_meta['scale_factor']).repeat(2)
        if rcnn_test_cfg is None:
            return InstanceData(bboxes=boxes, scores=scores)
        found, labels = multiclass_nms(
            boxes,
            scores,
            rcnn_test_cfg.score_thr,
            rcnn_test_cfg.nms,
            rcnn_test_cfg.max_per_img,
            score_factors=confidence,
        )
        return InstanceData(bboxes=found[:, :4], scores=found[:, -1], labels=labels)
