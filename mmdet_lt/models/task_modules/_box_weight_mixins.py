"""How each family of heads lets the weights of ground-truth boxes into its losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.dense_heads import ATSSHead, FCOSHead, RPNHead
from mmdet.models.dense_heads.anchor_head import AnchorHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.task_modules.samplers import PseudoSampler
from mmdet.utils import reduce_mean
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F

FIELD = 'loss_weights'
#: What a dense head must not replace, or the weights would be lost on the way.
_DENSE = ('loss', 'loss_and_predict', 'loss_by_feat', 'get_targets', '_get_targets_single')


class _BoxIndex:
    """Find the box behind each target label.

    Dense heads copy the label of the assigned box and forget the box. Here they get the number of
    the box in the batch in place of its label, shifted past the background label, and the labels
    are put back afterwards. Assignment and sampling do not look at labels.
    """

    def __init__(self, instances: list[InstanceData], num_classes: int) -> None:
        self.labels = torch.cat([item.labels for item in instances])
        self.weights = torch.cat([item[FIELD] for item in instances])
        self.shift = num_classes + 1
        numbers = torch.arange(len(self.labels), device=self.labels.device) + self.shift
        parts = numbers.split([len(item) for item in instances])
        self.instances = [
            InstanceData(bboxes=item.bboxes, labels=part)
            for item, part in zip(instances, parts, strict=True)
        ]

    def decode(self, coded: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and weights of samples of any shape; samples without a box weigh 1."""
        if len(self.labels) == 0:
            return coded, torch.ones_like(coded, dtype=self.weights.dtype)
        number = coded - self.shift
        has_box, number = number >= 0, number.clamp(min=0)
        one = self.weights.new_ones(())
        return (
            torch.where(has_box, self.labels[number], coded),
            torch.where(has_box, self.weights[number], one),
        )


def _has_weights(instances: list[InstanceData]) -> bool:
    return FIELD in instances[0]


@contextmanager
def _reweighted(
    loss: nn.Module, take: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[None]:
    """Inside, ``loss`` is called with ``kwargs`` changed by ``take(kwargs)``."""
    handle = loss.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, **take(kwargs)}), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


# ---- one mixin for each family ---------------------------------------------------------------


class BoxWeightsAnchor:
    """RPN, RetinaNet and other heads with AnchorHead's own targets and losses."""

    families = (AnchorHead, RPNHead)
    relies_on = (*_DENSE, 'loss_by_feat_single')

    def get_targets(self, anchors, flags, batch_gt_instances, *args, **kwargs):
        if not _has_weights(batch_gt_instances):
            return super().get_targets(anchors, flags, batch_gt_instances, *args, **kwargs)
        index = _BoxIndex(batch_gt_instances, self.num_classes)
        targets = super().get_targets(anchors, flags, index.instances, *args, **kwargs)
        labels, label_weights, box_targets, box_weights, avg_factor, *rest = targets
        labels, rows = _decode_levels(index, labels)
        label_weights = [a * b for a, b in zip(label_weights, rows, strict=True)]
        box_weights = [a * b[..., None] for a, b in zip(box_weights, rows, strict=True)]
        if isinstance(self.sampler, PseudoSampler):  # the others divide by all samples
            avg_factor = _positive_weight(labels, rows, self.num_classes)
        return (labels, label_weights, box_targets, box_weights, avg_factor, *rest)


class BoxWeightsATSS:
    """ATSS and heads that only change its layers."""

    families = (ATSSHead,)
    relies_on = (*_DENSE, 'loss_by_feat_single')
    _row_weights: Iterator[Tensor] | None = None

    def get_targets(self, anchors, flags, batch_gt_instances, *args, **kwargs):
        if not _has_weights(batch_gt_instances):
            self._row_weights = None
            return super().get_targets(anchors, flags, batch_gt_instances, *args, **kwargs)
        index = _BoxIndex(batch_gt_instances, self.num_classes)
        targets = super().get_targets(anchors, flags, index.instances, *args, **kwargs)
        anchors, labels, label_weights, box_targets, box_weights, _ = targets
        labels, rows = _decode_levels(index, labels)
        label_weights = [a * b for a, b in zip(label_weights, rows, strict=True)]
        # The levels come back to `loss_by_feat_single` in this order.
        self._row_weights = iter(rows)
        # ATSSHead makes a tensor of the number and reads it back, so it takes no tensor here.
        avg_factor = float(_positive_weight(labels, rows, self.num_classes))
        return anchors, labels, label_weights, box_targets, box_weights, avg_factor

    def loss_by_feat_single(
        self, anchors, cls_score, bbox_pred, centerness, labels, label_weights, box_targets, **kw
    ):
        args = (anchors, cls_score, bbox_pred, centerness, labels, label_weights, box_targets)
        if self._row_weights is None:
            return super().loss_by_feat_single(*args, **kw)
        flat = labels.reshape(-1)
        positive = (flat >= 0) & (flat < self.num_classes)
        rows = next(self._row_weights).reshape(-1)[positive]
        centre_sum = []

        def box(kwargs: dict) -> dict:
            weight = kwargs['weight'] * rows
            centre_sum.append(weight.sum())
            return dict(weight=weight)

        with (
            _reweighted(self.loss_bbox, box),
            _reweighted(self.loss_centerness, lambda kwargs: dict(weight=rows)),
        ):
            *losses, total = super().loss_by_feat_single(*args, **kw)
        return (*losses, centre_sum[0] if centre_sum else total)


class BoxWeightsFCOS:
    """FCOS and heads that only change its layers."""

    families = (FCOSHead,)
    relies_on = (*_DENSE, 'centerness_target')

    def get_targets(self, points, batch_gt_instances):
        if not _has_weights(batch_gt_instances):
            return super().get_targets(points, batch_gt_instances)
        index = _BoxIndex(batch_gt_instances, self.num_classes)
        labels, box_targets = super().get_targets(points, index.instances)
        labels, rows = _decode_levels(index, labels)
        self._set_weights(torch.cat(labels), torch.cat(rows), torch.cat(box_targets))
        return labels, box_targets

    def _set_weights(self, label: Tensor, row: Tensor, box_target: Tensor) -> None:
        """Weights and divisors; the divisors are averaged over ranks, so every rank comes here."""
        positive = (label >= 0) & (label < self.num_classes)
        self._rows, self._positive_rows = row, row[positive]
        centre = self.centerness_target(box_target[positive]) * self._positive_rows
        self._num_positive = reduce_mean(self._positive_rows.sum()).clamp(min=1)
        self._centre_sum = reduce_mean(centre.sum().detach()).clamp(min=1e-6)

    def loss_by_feat(self, cls_scores, box_preds, centers, batch_gt_instances, *args, **kwargs):
        call = (cls_scores, box_preds, centers, batch_gt_instances, *args)
        if not _has_weights(batch_gt_instances):
            return super().loss_by_feat(*call, **kwargs)
        # The losses are called after `get_targets`, so what these functions read is there by then.
        with (
            _reweighted(
                self.loss_cls, lambda kw: dict(weight=self._rows, avg_factor=self._num_positive)
            ),
            _reweighted(
                self.loss_bbox,
                lambda kw: dict(
                    weight=kw['weight'] * self._positive_rows, avg_factor=self._centre_sum
                ),
            ),
            _reweighted(
                self.loss_centerness,
                lambda kw: dict(weight=self._positive_rows, avg_factor=self._num_positive),
            ),
        ):
            return super().loss_by_feat(*call, **kwargs)


class BoxWeightsRoI:
    """BBoxHead, Shared2FCBBoxHead and heads that only change the layers or the loss.

    The targets of RoI heads are made from sampling results, which have no room for weights:
    ``box_weights``, one (G,) tensor an image, is set before each batch and None without weights.
    """

    families = (BBoxHead,)
    relies_on = ('get_targets', '_get_targets_single', 'loss_and_target', 'loss')
    box_weights: list[Tensor] | None = None

    def get_targets(self, sampling_results, rcnn_train_cfg, concat=True):
        if self.box_weights is None:
            return super().get_targets(sampling_results, rcnn_train_cfg, concat)
        targets = super().get_targets(sampling_results, rcnn_train_cfg, concat=False)
        labels, label_weights, box_targets, box_weights = targets
        for image, result in enumerate(sampling_results):
            row = self.box_weights[image][result.pos_assigned_gt_inds]
            row = torch.cat([row, row.new_ones(len(result.neg_priors))])
            label_weights[image] = label_weights[image] * row
            box_weights[image] = box_weights[image] * row[:, None]
        targets = (labels, label_weights, box_targets, box_weights)
        return tuple(torch.cat(part) for part in targets) if concat else targets


class BoxWeightsMask:
    """FCNMaskHead with mask cross entropy, the loss of Mask R-CNN."""

    families = (FCNMaskHead,)
    relies_on = ('get_targets', 'loss_and_target')

    def loss_and_target(self, mask_preds, sampling_results, batch_gt_instances, rcnn_train_cfg):
        if not _has_weights(batch_gt_instances) or len(mask_preds) == 0:
            return super().loss_and_target(
                mask_preds, sampling_results, batch_gt_instances, rcnn_train_cfg
            )
        targets = self.get_targets(sampling_results, batch_gt_instances, rcnn_train_cfg)
        label = torch.cat([result.pos_gt_labels for result in sampling_results])
        row = torch.cat(
            [
                instances[FIELD][result.pos_assigned_gt_inds]
                for instances, result in zip(batch_gt_instances, sampling_results, strict=True)
            ]
        )
        column = torch.zeros_like(label) if self.class_agnostic else label
        pred = mask_preds[torch.arange(len(label), device=label.device), column].float()
        # The mean over rows becomes one weighted by the boxes; equal weights give stock's own mean.
        row = row * (len(row) / row.sum())
        mean = F.binary_cross_entropy_with_logits(pred, targets, row[:, None, None])
        loss = self.loss_mask.loss_weight * mean[None]
        return dict(loss_mask=dict(loss_mask=loss), mask_targets=targets)


def _decode_levels(index: _BoxIndex, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [index.decode(level) for level in labels]
    return [label for label, _ in pairs], [row for _, row in pairs]


def _positive_weight(labels: list[Tensor], rows: list[Tensor], num_classes: int) -> Tensor:
    """Sum of the weights of positive samples, 0-d; at least 1 for each image, as mmdet counts."""
    label, row = torch.cat(labels, 1), torch.cat(rows, 1)
    return (row * ((label >= 0) & (label < num_classes))).sum(1).clamp(min=1).sum()
