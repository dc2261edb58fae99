"""Box heads that start a classifier from class statistics and add a column for objectness.

They are MMDetection's heads with two more arguments; everything else, ``cls_predictor_cfg`` (see
:class:`CosineLinear`, :class:`ScaledLinear`, :class:`TauNormLinear`) and ``reg_class_agnostic``
included, is theirs. Losses with columns of their own (EQLv2, Seesaw, group softmax) work in both.
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.roi_heads.bbox_heads import (
    ConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
)
from torch import nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import class_count
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.roi_heads.bbox_heads._prior import share_logits
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


class BalancedHead:
    """Mixin of the box heads below, and of those of Double-Head and SABL.

    Args:
        prior_foreground: Share of foreground among the RoIs that are trained on, in (0, 1), such as
            ``pos_fraction`` of the sampler. The bias of the classifier then starts from the share
            of every class: boxes of the class over all boxes, times this number. ``None`` leaves
            the initialisation to the head and to ``loss_cls.prior_prob``, which it replaces.
        objectness: Give a sigmoid loss without objectness a last column for background; scores of
            classes are multiplied by one minus its own. ``False`` leaves it to the loss.
        kwargs: Arguments of MMDetection's head.

    Raises:
        InputError: An argument does not fit the loss or the classifier.
    """

    def __init__(
        self, *args: Any, prior_foreground: float | None = None, objectness: bool = False, **kwargs
    ) -> None:
        if not isinstance(objectness, bool):
            raise InputError(f'`bbox_head.objectness` must be True or False, found {objectness!r}.')
        self._objectness = objectness
        super().__init__(*args, **kwargs)
        self.prior_foreground = prior_foreground
        self._statistics: ClassStatistics | None = None
        _refuse_unscored_loss(self.loss_cls)
        if prior_foreground is None:
            return
        if not (isinstance(prior_foreground, float) and 0 < prior_foreground < 1):
            raise InputError(
                f'`bbox_head.prior_foreground` must lie in (0, 1), found {prior_foreground!r}.'
            )
        if getattr(self.fc_cls, 'bias', None) is None:
            raise InputError(
                '`bbox_head.prior_foreground` sets the bias of the classifier, and '
                f'`bbox_head.cls_predictor_cfg` ({type(self.fc_cls).__name__}) has none: set its '
                '`bias=True`, or remove the key.'
            )

    @property
    def custom_cls_channels(self) -> bool:
        """Asked right before the width of the classifier is, so objectness is added here."""
        if self._objectness:
            if not isinstance(self.loss_cls, SigmoidLoss):
                raise InputError(
                    '`bbox_head.objectness=True` is for sigmoid losses of mmdet_lt, found '
                    f'{type(self.loss_cls).__name__} in `bbox_head.loss_cls`: remove the key.'
                )
            self.loss_cls.objectness = True
        return super().custom_cls_channels

    def set_class_statistics(self, stats: ClassStatistics) -> None:
        """Marker method: ``ClassStatisticsHook`` calls it with the training set's statistics."""
        self._statistics = stats

    def init_weights(self) -> None:
        """Initialise as the head does, then write the bias of the prior.

        Raises:
            InputError: The statistics never came, or have another class count.
        """
        super().init_weights()
        if self.prior_foreground is None:
            return
        if self._statistics is None:
            raise InputError(
                '`bbox_head.prior_foreground` needs class statistics: add '
                "`custom_hooks=[dict(type='mmdet_lt.ClassStatisticsHook')]`."
            )
        count = class_count(self._statistics, 'instance').double()
        if len(count) != self.num_classes:
            raise InputError(
                f'`bbox_head.num_classes` is {self.num_classes}, the statistics of '
                f'{self._statistics.source} have {len(count)} classes: make them equal.'
            )
        with torch.no_grad():
            bias = self.fc_cls.bias
            share = count / count.sum()
            bias.copy_(share_logits(self.loss_cls, share, self.prior_foreground, len(bias)))


def _refuse_unscored_loss(loss: nn.Module) -> None:
    """MMDetection's box heads test with a softmax unless the loss brings its own activation."""
    if getattr(loss, 'use_sigmoid', False) and not getattr(loss, 'custom_cls_channels', False):
        raise InputError(
            f'`bbox_head.loss_cls` ({type(loss).__name__}, use_sigmoid=True) would be tested with '
            'a softmax in a box head: use a sigmoid loss of mmdet_lt, such as mmdet_lt.BCELoss or '
            'mmdet_lt.FocalLoss, or set `use_sigmoid=False`.'
        )


@MODELS.register_module()
class BalancedConvFCBBoxHead(BalancedHead, ConvFCBBoxHead):
    """``ConvFCBBoxHead`` with the arguments of :class:`BalancedHead`."""


@MODELS.register_module()
class BalancedShared2FCBBoxHead(BalancedHead, Shared2FCBBoxHead):
    """``Shared2FCBBoxHead`` with the arguments of :class:`BalancedHead`."""


@MODELS.register_module()
class BalancedShared4Conv1FCBBoxHead(BalancedHead, Shared4Conv1FCBBoxHead):
    """``Shared4Conv1FCBBoxHead`` with the arguments of :class:`BalancedHead`."""
