"""Base of the softmax losses: a method states its adjustment of the logits, the rest is here."""

from __future__ import annotations

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.ops.sigmoid import compute_dtype
from mmdet_lt.ops.softmax import Adjustment, soft_softmax_loss, softmax_loss


class SoftmaxLoss(LongTailLoss):
    """A loss of one softmax over C classes and background, the last column.

    Sub-classes implement :meth:`adjustment` (logits) or :meth:`label_weight` (rows).

    Logits of C columns are accepted too, for classifiers without background: background rows then
    have loss 0.
    """

    sigmoid = False
    extra_columns = 1
    extra_columns_dense = 1
    #: Factor of the logits, in training and at test.
    scale = 1.0

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.prior_prob is not None:
            raise InputError(
                f'`loss_cls.prior_prob` is for sigmoid losses, {self.name} is a softmax loss: '
                'remove it.'
            )

    def adjustment(self, rows: Rows) -> Tensor | Adjustment | None:
        """What is added to the logits in training: a vector (K,), a function of rows, nothing."""
        return None

    def label_weight(self) -> Tensor | None:
        """Factor of the rows of each class, (C + 1,) with background last."""
        return None

    def allowed_extra(self) -> tuple[int, ...]:
        return (0, 1)

    def prior_bias(self) -> float | None:
        return None

    def compute(self, rows: Rows) -> Tensor:
        loss = self.row_losses(rows)
        weight = rows.row_weight if rows.plain else None
        for factor in (self.label_weight(), getattr(self, 'fixed_weight', None)):
            if factor is not None:
                factor = factor.to(loss.dtype)[rows.label]
                weight = factor if weight is None else weight * factor
        # A weight of 0 must also hide an infinite loss: 0 * inf is NaN.
        if weight is not None:
            loss = loss.masked_fill(weight == 0, 0) * weight
        return loss if rows.per_entry else loss.sum()

    def row_losses(self, rows: Rows) -> Tensor:
        """Loss of each row, (N,); row weights are not in it, weights of entries are."""
        adjust = self.adjustment(rows)
        if rows.plain:
            return softmax_loss(rows.z, rows.label, adjust, self.scale)
        target = rows.target(distribution=True)
        if rows.weight is not None:
            target = target * rows.entry_weight
        return soft_softmax_loss(rows.z, target, adjust, self.scale)

    # ---- scores ----------------------------------------------------------------------------

    def get_activation(self, cls_score: Tensor) -> Tensor:
        self.check_width(cls_score)
        scores = torch.softmax(cls_score.to(compute_dtype(cls_score)) * self.scale, -1)
        if cls_score.shape[-1] == self.num_classes:
            if self.context == 'roi':
                return torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
            return scores
        return scores if self.context == 'roi' else scores[..., :-1]

    def predict(self, cls_score: Tensor) -> Tensor:
        return cls_score.float().argmax(1)
