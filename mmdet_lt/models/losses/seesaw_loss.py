r"""Seesaw loss: softmax whose negatives count less for rare classes, more where they win.

Paper: Wang et al., *Seesaw Loss for Long-Tailed Instance Segmentation*, CVPR 2021,
https://arxiv.org/abs/2008.10032. Reference: ``SeesawLoss`` of MMDetection 3.3.

.. math::
    L = \frac{1}{A} \sum_i s_i \Big[\mathbb{1}[y_i < C]\; \mathrm{CE}\big(z_{i,:C} + b(i), y_i\big)
        + \mathrm{CE}\big(z_{i,C:}, \mathbb{1}[y_i = C]\big)\Big]

    b_j(i) = \underbrace{p \min(0, \log N_j - \log N_{y_i})}_{\text{mitigation}}
        + \underbrace{q \max(0, \log\sigma_{ij} - \log\max(\sigma_{i y_i}, \epsilon))}
          _{\text{compensation}}

where ``N_j`` is the number of rows of class ``j`` so far (at least 1), ``σ`` the softmax of the C
class logits, ``s_i`` is ``weight`` and ``A`` is ``avg_factor``. The last two columns are the
objectness, foreground first. ``b`` carries no gradient. Scores at test: ``softmax_C(z)_j p_fg`` and
``p_bg``.

``b`` needs no logarithm of a score: with ``S = log Σ exp z`` the compensation is
``q max(0, z_ij - max(z_iy, S + log ε))``, and no matrix of C x C ratios.

Differs from MMDetection's ``SeesawLoss``: rows of all ranks are counted, without a host
synchronisation per label; rows of weight 0 are not counted, nor are those of ``no_grad``, eval and
``reduction='none'`` calls (OHEM, PISA); ``'none'`` gives one value a row; without ``avg_factor``
both terms divide by the rows (there the classes by the foreground rows); one loss by default, two
with ``return_dict``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.rows import Rows, one_hot
from mmdet_lt.models.losses.running import RunningStatistics
from mmdet_lt.models.losses.softmax_loss import SoftmaxLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import compute_dtype
from mmdet_lt.ops.softmax import (
    Adjustment,
    grouped_softmax_loss,
    log_sum_exp,
    soft_grouped_softmax_loss,
)
from mmdet_lt.registry import MODELS


def seesaw_adjustment(
    cum_samples: Tensor, p: float = 0.8, q: float = 2.0, eps: float = 1e-2
) -> Adjustment:
    """``z + b(i)``, up to a constant of each row, as a function that overwrites its block.

    Args:
        cum_samples: ``N``, (C,), in the precision of the blocks.
        p: Strength of the mitigation.
        q: Strength of the compensation.
        eps: Least score ``ε`` a label is compared with.
    """
    scaled_log = p * cum_samples.clamp_min(1).log()

    def adjust(x: Tensor, label: Tensor) -> Tensor:
        index = label.unsqueeze(1)
        work = torch.softmax(x, 1)
        own = torch.maximum(x.gather(1, index), log_sum_exp(x, work) + math.log(eps))
        # A constant of the row changes no softmax: it saves passes to leave `own` out of the
        # logits, where the compensation is the steeper side of a leaky ReLU, and to add
        # min(log N_j, log N_y) for min(0, log N_j - log N_y).
        below = F.leaky_relu_(torch.sub(own, x, out=x), 1 + q)
        return torch.minimum(scaled_log, scaled_log[index], out=work).sub_(below)

    return adjust


def seesaw_loss(
    z: Tensor,
    label: Tensor,
    cum_samples: Tensor,
    p: float = 0.8,
    q: float = 2.0,
    eps: float = 1e-2,
) -> Tensor:
    """Both terms of every row.

    Args:
        z: Logits, (N, C + 2), any floating dtype.
        label: Class of each row, (N,) int64; outside ``[0, C)``: background.
        cum_samples: ``N``, (C,).
        p: Strength of the mitigation.
        q: Strength of the compensation.
        eps: Least score ``ε`` a label is compared with.

    Returns:
        (N, 2): the loss of the classes, 0 in background rows, and of the objectness.
    """
    num_classes = z.shape[1] - 2
    is_bg = (label < 0) | (label >= num_classes)
    adjust = seesaw_adjustment(cum_samples.to(compute_dtype(z)), p, q, eps)
    labels = torch.stack([label, is_bg.long()], 1)
    return grouped_softmax_loss(z, labels, [num_classes, 2], [adjust, None])


@MODELS.register_module()
class SeesawLoss(RunningStatistics, SoftmaxLoss):
    """Seesaw loss, see the formula above. For RoI heads only: C + 2 columns.

    Args:
        p: Strength of the mitigation, at least 0.
        q: Strength of the compensation, at least 0.
        eps: Least score ``ε`` of a label in the compensation, in (0, 1].
        return_dict: Give ``loss_cls_objectness`` and ``loss_cls_classes`` in a dict, as
            MMDetection does, instead of their sum. Heads other than ``BBoxHead``, OHEM and PISA
            need the sum.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, float32 (C + 1,), saved in checkpoints: ``cum_samples``, rows of each class and of
    background so far, this call's included. Of the same name and shape as MMDetection's.

    Shapes: logits (N, C + 2): classes, foreground, background.
    """

    tags = LossTags(
        title='Seesaw loss',
        paper='CVPR 2021',
        url='https://arxiv.org/abs/2008.10032',
        running=True,
        variants=(dict(p=0.0), dict(q=0.0), dict(p=2.0, eps=0.5)),
    )
    extra_columns = 2
    extra_columns_dense = None
    state_names = ('cum_samples',)
    state_extra = 1

    def __init__(
        self,
        p: float = 0.8,
        q: float = 2.0,
        eps: float = 1e-2,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> None:
        for key, value in dict(p=p, q=q).items():
            if not 0 <= value < math.inf:
                raise InputError(
                    f'`loss_cls.{key}` of SeesawLoss must be at least 0, found {value}.'
                )
        if not 0 < eps <= 1:
            raise InputError(f'`loss_cls.eps` of SeesawLoss must lie in (0, 1], found {eps}.')
        self.p, self.q, self.eps = p, q, eps
        self.return_dict = return_dict
        super().__init__(**kwargs)
        self.init_running()

    def size_buffers(self, num_classes: int) -> None:
        self.register_buffer('cum_samples', torch.zeros(num_classes + 1))

    def increment_like(self) -> Tensor:
        return self.cum_samples

    def apply_increment(self, increment: Tensor) -> None:
        self.cum_samples = self.cum_samples + increment

    def reset_running(self) -> None:
        self.cum_samples = torch.zeros_like(self.cum_samples)

    def allowed_extra(self) -> tuple[int, ...]:
        return (self.extra_columns,)

    def _samples(self, rows: Rows) -> Tensor:
        """``N``, (C,), with the rows of this call and those that wait for the optimiser step."""
        if rows.count:
            weight = rows.row_weight
            one = torch.ones_like(rows.label) if weight is None else weight != 0
            seen = torch.zeros_like(self.cum_samples)
            self.add_increment(seen.index_add_(0, rows.label, one.to(seen.dtype)))
        total = self.cum_samples
        if self.pending.shape == total.shape:
            total = total + self.pending
        return total[: self.num_classes]

    def row_losses(self, rows: Rows) -> Tensor:
        """Objectness and classes, (2, N)."""
        samples = self._samples(rows)
        if rows.plain:
            losses = seesaw_loss(rows.z, rows.label, samples, self.p, self.q, self.eps)
            return losses.T.flip(0)
        soft, background = rows.soft, rows.background
        if soft is None:
            soft = one_hot(rows.label, self.num_classes, compute_dtype(rows.z))
        foreground = soft.sum(1)
        if background is None:
            background = (1 - foreground).clamp_min(0)
        target = torch.cat([soft, torch.stack([foreground, background], 1)], 1)
        if rows.weight is not None:
            target = target * rows.entry_weight
        adjust = seesaw_adjustment(samples.to(target.dtype), self.p, self.q, self.eps)
        sizes = [self.num_classes, 2]
        return soft_grouped_softmax_loss(rows.z, target, sizes, [adjust, None]).T.flip(0)

    def compute(self, rows: Rows) -> Tensor:
        parts = super().compute(replace(rows, per_entry=True))
        if not rows.per_entry:
            parts = parts.sum(1)
        return parts if self.return_dict else parts.sum(0)

    def _empty(self, rows: Rows) -> Tensor:
        zero = super()._empty(rows)
        return torch.stack([zero, zero]) if self.return_dict else zero

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | dict[str, Tensor]:
        """As :meth:`LongTailLoss.forward`; a dict with ``return_dict``."""
        loss = super().forward(*args, **kwargs)
        if not self.return_dict:
            return loss
        return dict(loss_cls_objectness=loss[0], loss_cls_classes=loss[1])

    # ---- scores ----------------------------------------------------------------------------

    def get_activation(self, cls_score: Tensor) -> Tensor:
        self.check_width(cls_score)
        z = cls_score.to(compute_dtype(cls_score))
        classes = torch.softmax(z[..., :-2], -1)
        objectness = torch.softmax(z[..., -2:], -1)
        return torch.cat([classes * objectness[..., :1], objectness[..., 1:]], -1)

    def predict(self, cls_score: Tensor) -> Tensor:
        z = cls_score.float()
        best, predicted = z[:, :-2].max(1)
        log_odds = z[:, -2] - z[:, -1]
        foreground = best - z[:, :-2].logsumexp(1) + F.logsigmoid(log_odds)
        return predicted.masked_fill(F.logsigmoid(-log_odds) > foreground, self.num_classes)
