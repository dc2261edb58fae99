"""Base of the losses that spare tail classes: those whose image frequency is below a threshold."""

from __future__ import annotations

from typing import Any

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.statistics import ClassStatistics


class TailLoss(SigmoidLoss):
    """A sigmoid loss with the buffer ``tail`` (C,): 1 for tail classes, else 0.

    Args:
        lambda_: Frequency threshold λ, a fraction of the annotated images.
        prior_prob: π the classifier of an RoI head starts from.
        kwargs: Arguments of :class:`LongTailLoss`.
    """

    state_names = ('tail',)

    def __init__(
        self, lambda_: float = 0.0011, prior_prob: float | None = 0.001, **kwargs: Any
    ) -> None:
        if not 0 <= lambda_ <= 1:
            raise InputError(
                f'`loss_cls.lambda_` of {self.name} is a fraction of images in [0, 1], found '
                f'{lambda_}.'
            )
        self.lambda_ = lambda_
        super().__init__(prior_prob=prior_prob, **kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(tail=num_classes)

    def take_statistics(self, stats: ClassStatistics) -> None:
        self.fill_static(tail=stats.image_frequency < self.lambda_)
