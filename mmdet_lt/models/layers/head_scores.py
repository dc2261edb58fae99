"""What heads with score rules of their own need to follow a loss of this package.

Most heads of MMDetection take ``sigmoid`` or ``softmax`` of their logits wherever they want a score
and never ask the loss. The adapters hand such code logits ``z'`` whose ``sigmoid`` or ``softmax``
are the loss's own scores, and hand the loss the logits that the classifier gave.

Letters: ``C`` classes, ``K`` columns of logits, ``A`` anchors of a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.prior_state import classifiers
from mmdet_lt.models.losses.base import LongTailLoss


def class_scores(loss: LongTailLoss, z: Tensor) -> Tensor:
    """The loss's scores at test, (..., C) in [0, 1], of logits (..., K); float32."""
    scores = loss.get_activation(z.reshape(-1, z.shape[-1]))
    return scores[:, : loss.num_classes].reshape(*z.shape[:-1], -1)


def sigmoid_logits(loss: LongTailLoss, z: Tensor) -> Tensor:
    """Logits (..., K) whose sigmoid is the score of each class, and 0 in columns beyond C."""
    scores = class_scores(loss, z)
    logits = scores.log() - torch.log1p(-scores)
    missing = z.shape[-1] - logits.shape[-1]
    if missing:
        none = logits.new_full((*logits.shape[:-1], missing), float('-inf'))
        logits = torch.cat([logits, none], -1)
    return logits


def softmax_logits(loss: LongTailLoss, z: Tensor) -> Tensor:
    """Logits (..., C + 1) of a softmax loss whose softmax are its scores, background last."""
    scores = class_scores(loss, z)
    rest = (1 - scores.sum(-1, keepdim=True)).clamp_min(0)
    return torch.cat([scores, rest], -1).clamp_min(torch.finfo(scores.dtype).tiny).log()


def stock_logits(loss: LongTailLoss, z: Tensor) -> Tensor:
    """For heads that take a sigmoid or a softmax, depending on ``loss.use_sigmoid``."""
    return sigmoid_logits(loss, z) if loss.sigmoid else softmax_logits(loss, z)


def on_maps(function: Callable[[Tensor], Tensor], maps: Tensor, columns: int) -> Tensor:
    """Apply a function of (..., K) to feature maps (N, A * K, H, W)."""
    size = maps.shape
    rows = maps.reshape(size[0], -1, columns, *size[2:]).movedim(2, -1)
    return function(rows).movedim(-1, 2).reshape(size[0], -1, *size[2:])


@contextmanager
def loss_input(loss: nn.Module, change: Callable[[Any, Any], tuple[Any, Any]]) -> Iterator[None]:
    """Inside, ``loss(score, target, ...)`` gets ``change(score, target)`` in their place."""
    handle = loss.register_forward_pre_hook(
        lambda module, args: (*change(args[0], args[1]), *args[2:])
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def uncounted(loss: nn.Module) -> Iterator[None]:
    """Inside, running statistics of ``loss`` learn nothing."""
    training = loss.training
    loss.training = False
    try:
        yield
    finally:
        loss.training = training


class FollowsLoss:
    """Mixin of the adapters: only losses of this package, start bias, what they refuse.

    The bias of the classifier starts at ``loss.prior_bias()`` where the logits of the loss are
    bounded (Gumbel): MMDetection's start for a sigmoid lies below the clamp, where the gradient is
    0. All other losses keep the head's own start.
    """

    #: The head check asks no further.
    follows_loss = True
    #: Whether a softmax loss (C + 1 columns) works.
    takes_softmax = True
    softmax_reason = ''
    #: Head of another detector that takes them.
    softmax_head = 'RetinaHead'

    def check_loss(self) -> None:
        """Call at the end of the constructor.

        Raises:
            InputError: A loss of another package, or one that the head has no columns for.
        """
        loss, name = self.loss_cls, type(self).__name__
        if not isinstance(loss, LongTailLoss):
            raise InputError(
                f'{name} works with losses of mmdet_lt, found {type(loss).__name__} in `loss_cls`: '
                f"use `type='{name[2:]}'` for it."
            )
        if loss.dense_columns(self.num_classes) is None:
            raise InputError(
                f'{loss.name} in `loss_cls` of {name} needs {loss.extra_columns} columns beside '
                'the classes, this head has room for one at most: use it in an RoI head such as '
                'Shared2FCBBoxHead.'
            )
        if not loss.sigmoid and not self.takes_softmax:
            raise InputError(
                f'{loss.name} is a softmax loss, {name} works with sigmoid losses only '
                f'({self.softmax_reason}): choose one of those for `loss_cls`, or a detector with '
                f'{self.softmax_head}.'
            )
        # A head that also asks BBoxHead's questions must not turn the loss into one of RoI heads.
        loss.context = 'dense'

    def check_width(self, columns: int) -> None:
        """Raise InputError unless the classifier has the columns the loss needs."""
        wanted = self.loss_cls.dense_columns(self.num_classes)
        if columns != wanted:
            raise InputError(
                f'the classifier of {type(self).__name__} has {columns} columns for '
                f'{self.num_classes} classes, {self.loss_cls.name} needs {wanted}: write '
                f'`loss_cls.use_sigmoid={self.loss_cls.sigmoid}` in the config.'
            )

    def init_weights(self) -> None:
        super().init_weights()
        if self.loss_cls.tags.bounded_logits and self.loss_cls.prior_bias() is not None:
            self.start_at(self.loss_cls.prior_bias())

    def start_at(self, bias: float) -> None:
        """Set the bias of every classifier."""
        for layer in classifiers(self).values():
            nn.init.constant_(layer.bias, bias)


def copy_config(config: Any) -> ConfigDict:
    """A copy that heads may write to."""
    return ConfigDict(dict(config))
