"""One-stage heads that train with ``(label, quality)`` targets: GFL, RTMDet, TOOD, VFNet.

The losses take the label's column with the quality as its target, see
:meth:`LongTailLoss.forward`. What a head computes from scores while it trains (GFL's box weights,
the assigners of RTMDet and TOOD) uses the scores of the loss as well.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from mmdet.models.dense_heads import (
    GFLHead,
    RTMDetHead,
    RTMDetSepBNHead,
    TOODHead,
    VFNetHead,
)
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.head_scores import (
    FollowsLoss,
    class_scores,
    copy_config,
    loss_input,
    on_maps,
    sigmoid_logits,
)
from mmdet_lt.models.losses.focal_loss import logit_of_score
from mmdet_lt.registry import MODELS


class SigmoidAtTest(FollowsLoss):
    """Mixin for heads whose ``_predict_by_feat_single`` takes the sigmoid of score maps."""

    def _predict_by_feat_single(self, cls_score_list: list[Tensor], *args: Any, **kwargs: Any):
        convert = partial(sigmoid_logits, self.loss_cls)
        maps = [on_maps(convert, x[None], self.cls_out_channels)[0] for x in cls_score_list]
        return super()._predict_by_feat_single(maps, *args, **kwargs)


@MODELS.register_module()
class LTGFLHead(SigmoidAtTest, GFLHead):
    """:class:`GFLHead` for every loss of this package that fits a dense head.

    Test scores and the weights of the box losses are the loss's own scores. Arguments are those of
    :class:`GFLHead`.

    Raises:
        InputError: The loss does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_loss()
        self.check_width(self.cls_out_channels)

    def loss_by_feat_single(self, anchors: Tensor, cls_score: Tensor, *args: Any, **kwargs: Any):
        columns = self.cls_out_channels
        rows = cls_score.permute(0, 2, 3, 1).reshape(-1, columns)
        seen = on_maps(partial(sigmoid_logits, self.loss_cls), cls_score.detach(), columns)
        with loss_input(self.loss_cls, lambda score, target: (rows, target)):
            return super().loss_by_feat_single(anchors, seen, *args, **kwargs)


class OneDivisor:
    """Mixin: a loss with a divisor of its own (GHM-C) is not divided again.

    RTMDet and TOOD divide the sum of their levels by that of the assigner's metrics, the third
    thing :meth:`loss_by_feat_single` gives; a sum below 1 counts as 1.
    """

    def loss_by_feat_single(self, *args: Any, **kwargs: Any) -> tuple:
        loss_cls, loss_bbox, divisor, *rest = super().loss_by_feat_single(*args, **kwargs)
        tags = getattr(self.loss_in_use(), 'tags', None)
        if tags is not None and tags.own_normalizer:
            divisor = torch.zeros_like(divisor)
        return loss_cls, loss_bbox, divisor, *rest

    def loss_in_use(self) -> nn.Module:
        """The classification loss of this iteration."""
        return self.loss_cls


class _ScoresForRTMDet(OneDivisor, FollowsLoss):
    """Scores of the loss for the assigner; the test path asks the loss already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.check_loss()
        self.check_width(self.cls_out_channels)
        if self.with_objectness and not self.loss_cls.sigmoid:
            raise InputError(
                f'{self.loss_cls.name} is a softmax loss, which has no objectness beside it: set '
                f'`bbox_head.with_objectness=False` of {type(self).__name__}.'
            )

    def get_targets(self, cls_scores: Tensor, *args: Any, **kwargs: Any):
        seen = sigmoid_logits(self.loss_cls, cls_scores.detach())
        # The assigner takes logarithms of scores: no infinities.
        return super().get_targets(seen.clamp(-50, 50), *args, **kwargs)

    def start_at(self, bias: float) -> None:
        super().start_at(bias)
        if self.with_objectness:
            layers = self.rtm_obj if isinstance(self.rtm_obj, nn.ModuleList) else [self.rtm_obj]
            for layer in layers:
                nn.init.constant_(layer.bias, bias)


@MODELS.register_module()
class LTRTMDetHead(_ScoresForRTMDet, RTMDetHead):
    """:class:`RTMDetHead` whose assigner sees the scores of the loss; takes its arguments."""


@MODELS.register_module()
class LTRTMDetSepBNHead(_ScoresForRTMDet, RTMDetSepBNHead):
    """:class:`RTMDetSepBNHead` whose assigner sees the scores of the loss; takes its arguments."""


@MODELS.register_module()
class LTTOODHead(OneDivisor, FollowsLoss, TOODHead):
    """:class:`TOODHead` that gives the loss logits.

    TOOD multiplies two sigmoids and hands on ``p``, the root of their product. Here the head hands
    on ``logit(p)``; assigner and test use the loss's scores of it, which for a loss of plain
    sigmoids is ``p`` again.

    Args:
        initial_loss_cls: Loss of the first ``train_cfg.initial_epoch`` epochs, which trains labels
            without quality; a sigmoid loss of logits. ``activated`` in it, which stock configs
            have, is taken out. None: ``loss_cls`` from the start, also the only choice for softmax
            losses.
        kwargs: Arguments of :class:`TOODHead`.

    Raises:
        InputError: The loss does not fit.
    """

    def __init__(self, *args: Any, initial_loss_cls: Any = None, **kwargs: Any) -> None:
        same = initial_loss_cls is None
        initial = copy_config(kwargs.get('loss_cls', dict()) if same else initial_loss_cls)
        initial.pop('activated', None)
        super().__init__(*args, initial_loss_cls=initial, **kwargs)
        self.check_loss()
        self.check_width(self.cls_out_channels)
        if same and self.train_cfg:
            # Not a second entry among the modules: checkpoints would hold the state twice.
            del self.initial_loss_cls
            self.__dict__['initial_loss_cls'] = self.loss_cls
        elif not self.loss_cls.sigmoid:
            raise InputError(
                f'{self.loss_cls.name} is a softmax loss, its classifier cannot start with the '
                'sigmoid loss of `initial_loss_cls`: set `bbox_head.initial_loss_cls=None`.'
            )

    def forward(self, x: tuple[Tensor, ...]) -> tuple:
        scores, boxes = super().forward(x)
        return tuple(logit_of_score(score) for score in scores), boxes

    def loss_in_use(self) -> nn.Module:
        return self.initial_loss_cls if self.epoch < self.initial_epoch else self.loss_cls

    def _scores(self, z: Tensor) -> Tensor:
        """(..., K): scores of the classes, 0 beyond."""
        scores = class_scores(self.loss_cls, z)
        missing = z.shape[-1] - scores.shape[-1]
        return torch.cat([scores, scores.new_zeros(*scores.shape[:-1], missing)], -1)

    def get_targets(self, cls_scores: Tensor, *args: Any, **kwargs: Any):
        return super().get_targets(self._scores(cls_scores.detach()), *args, **kwargs)

    def _predict_by_feat_single(self, cls_score_list: list[Tensor], *args: Any, **kwargs: Any):
        columns = self.cls_out_channels
        maps = [on_maps(self._scores, x[None], columns)[0] for x in cls_score_list]
        return super()._predict_by_feat_single(maps, *args, **kwargs)

    def start_at(self, bias: float) -> None:
        # Both factors start at the same sigmoid, whose mean then is that sigmoid.
        super().start_at(bias)
        nn.init.constant_(self.cls_prob_module[-1].bias, bias)


@MODELS.register_module()
class LTVFNetHead(FollowsLoss, VFNetHead):
    """:class:`VFNetHead` with a background column for softmax losses; takes its arguments.

    ``use_vfl=True`` trains the IoU of each positive as a soft target with ``loss_cls``;
    ``use_vfl=False`` trains labels with ``loss_cls_fl``.

    Raises:
        InputError: The loss does not fit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = 'loss_cls' if kwargs.get('use_vfl', True) else 'loss_cls_fl'
        self._softmax = not kwargs.get(name, dict(use_sigmoid=True)).get('use_sigmoid', False)
        super().__init__(*args, **kwargs)
        self.use_sigmoid_cls = not self._softmax
        self.check_loss()
        self.check_width(self.cls_out_channels)

    def _init_layers(self) -> None:
        # VFNetHead never tells the class above it what `loss_cls` is, so the width is C there.
        self.cls_out_channels = self.num_classes + self._softmax
        super()._init_layers()

    def loss_by_feat(self, *args: Any, **kwargs: Any) -> dict:
        def change(score: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            # The matrix of VFNetHead has a column for background, but nothing in it: without the
            # column background is what the classes leave over.
            return score, target[:, : self.num_classes] if target.dim() == 2 else target

        with loss_input(self.loss_cls, change):
            return super().loss_by_feat(*args, **kwargs)
