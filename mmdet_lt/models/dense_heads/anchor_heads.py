"""One-stage heads that need more than their own score rule: PAA, YOLOF, YOLOX."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmdet.models.dense_heads import PAAHead, YOLOFHead, YOLOXHead
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.dense_heads.quality_heads import SigmoidAtTest
from mmdet_lt.models.layers.head_scores import FollowsLoss, on_maps, sigmoid_logits
from mmdet_lt.registry import MODELS


@MODELS.register_module()
class LTPAAHead(SigmoidAtTest, PAAHead):
    """:class:`PAAHead` for every loss of this package that fits a dense head; takes its arguments.

    PAA first asks for the loss of each candidate (``reduction='none'``, never counted by running
    statistics) and sums its last axis, so the one value a row of softmax losses gets an axis of
    its own. They come in double precision: the mixture model that PAA fits to them fails in single
    precision where they are large and nearly equal. Test scores are the loss's own. Needs
    scikit-learn, as the stock head does.

    Raises:
        InputError: The loss does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_loss()
        self.check_width(self.cls_out_channels)

    def get_pos_loss(self, *args: Any, **kwargs: Any) -> tuple:
        handle = self.loss_cls.register_forward_hook(
            lambda module, inputs, loss: loss[:, None] if loss.dim() == 1 else loss
        )
        try:
            return tuple(losses.double() for losses in super().get_pos_loss(*args, **kwargs))
        finally:
            handle.remove()


@MODELS.register_module()
class LTYOLOFHead(FollowsLoss, YOLOFHead):
    """:class:`YOLOFHead` whose classifier starts where the loss has a gradient.

    Its logits are the log-odds of a class score times an objectness, so softmax losses are refused.
    Takes the arguments of :class:`YOLOFHead`.

    Raises:
        InputError: The loss does not fit.
    """

    takes_softmax = False
    softmax_reason = 'its logits contain an objectness'

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_loss()
        self.check_width(self.cls_out_channels)


class _ZeroLoss(nn.Module):
    """Stands in for a loss that is computed elsewhere."""

    def forward(self, score: Tensor, *args: Any) -> Tensor:
        return score.new_zeros(())


@MODELS.register_module()
class LTYOLOXHead(FollowsLoss, YOLOXHead):
    """:class:`YOLOXHead` whose classification loss sees every anchor point.

    YOLOX shows the loss its positives only, where long-tail losses have nothing to balance: no
    background, hardly a negative of a rare class. Here every point is a row; the target of a
    positive is its IoU with the object in the column of the label, as in YOLOX, that of all others
    is background. The divisor is YOLOX's, the positives averaged over ranks; ``reduction`` of the
    loss is not used. The score of a class, multiplied by the objectness at test as in YOLOX, is
    then no longer conditional on an object being there.

    Softmax losses have a column for background. The assigner sees the scores of the loss. Takes the
    arguments of :class:`YOLOXHead`.

    Raises:
        InputError: The loss does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if 'loss_cls' not in kwargs:
            raise InputError('LTYOLOXHead needs `bbox_head.loss_cls`, a loss of mmdet_lt.')
        # Stock code reads `cls_out_channels` as the columns of scores, which are always C; layers
        # are made by `_build_predictor`, before a loss is at hand in this class.
        self._background = int(not kwargs['loss_cls'].get('use_sigmoid', False))
        super().__init__(*args, **kwargs)
        self.check_loss()
        self.check_width(self.classifier_columns)

    @property
    def classifier_columns(self) -> int:
        """Width of the classifier; ``cls_out_channels`` is that of the scores."""
        return self.num_classes + self._background

    def _build_predictor(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        _, conv_reg, conv_obj = super()._build_predictor()
        return nn.Conv2d(self.feat_channels, self.classifier_columns, 1), conv_reg, conv_obj

    def start_at(self, bias: float) -> None:
        for layer in self.multi_level_conv_cls:
            nn.init.constant_(layer.bias, bias)

    def _for_stock(self, loss: nn.Module, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (N, C, H, W) whose sigmoid are the scores of the loss."""
        convert = partial(sigmoid_logits, loss)
        columns = self.classifier_columns
        return [on_maps(convert, x, columns)[:, : self.num_classes] for x in maps]

    def predict_by_feat(self, cls_scores: Sequence[Tensor], *args: Any, **kwargs: Any):
        return super().predict_by_feat(self._for_stock(self.loss_cls, cls_scores), *args, **kwargs)

    def loss_by_feat(self, cls_scores: Sequence[Tensor], *args: Any, **kwargs: Any) -> dict:
        self._targets: list[Tensor] = []
        self._positives = 0
        loss_cls, self.loss_cls = self.loss_cls, _ZeroLoss()
        try:
            seen = self._for_stock(loss_cls, [x.detach() for x in cls_scores])
            losses = super().loss_by_feat(seen, *args, **kwargs)
        finally:
            self.loss_cls = loss_cls
        target = torch.cat(self._targets)
        del self._targets
        rows = [
            x.permute(0, 2, 3, 1).reshape(len(x), -1, self.classifier_columns) for x in cls_scores
        ]
        positives = target.new_tensor(float(self._positives))
        losses['loss_cls'] = self.loss_cls(
            torch.cat(rows, 1).flatten(0, 1),
            target,
            avg_factor=reduce_mean(positives).clamp(min=1),
            reduction_override='mean',
        )
        return losses

    def _get_targets_single(self, priors: Tensor, *args: Any, **kwargs: Any) -> tuple:
        found = super()._get_targets_single(priors, *args, **kwargs)
        mask, class_target, *_, positives = found
        self._positives += positives
        target = class_target.new_zeros(len(priors), self.num_classes)
        self._targets.append(target.masked_scatter(mask[:, None], class_target))
        return found
