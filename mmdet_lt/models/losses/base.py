"""The contract between MMDetection's heads and every classification loss of this package.

Letters: ``N`` rows, ``C`` foreground classes, ``K`` columns of logits. Background label: ``C``.

A loss says its *layout*:

- ``'classes'``: ``K = C`` sigmoid columns, background is the all-zero target row;
- ``'classes+objectness'``: in RoI heads ``K = C + 1``, the last column is the objectness of
  background; dense heads have no room for it, there ``K = C``.

RoI heads ask :meth:`LongTailLoss.get_cls_channels` while they are built, dense heads never do.
That call is how a loss knows its context: scores of an RoI head need ``C + 1`` columns with
background last, scores of a dense head exactly ``C``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.ops.sigmoid import compute_dtype
from mmdet_lt.statistics import ClassStatistics

REDUCTIONS = ('none', 'mean', 'sum')


def one_hot(label: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """(N, K) one-hot rows; labels outside ``[0, K)`` give zero rows."""
    inside = (label >= 0) & (label < num_columns)
    target = torch.zeros(len(label), num_columns, dtype=dtype, device=label.device)
    return target.scatter_(1, label.clamp(0, num_columns - 1)[:, None], inside[:, None].to(dtype))


def reduce_loss(total: Tensor, rows: int, avg_factor: Any, reduction: str) -> Tensor:
    """``total / avg_factor`` for 'mean' (by rows when it is None), ``total`` for 'sum'.

    ``avg_factor`` may be a number, a 0-d or a (1,) tensor; 0 counts as 1, since a batch without
    positives must give a finite loss.
    """
    if reduction == 'sum':
        if avg_factor is not None:
            raise ValueError("avg_factor cannot be used with reduction='sum': it divides a mean.")
        return total
    if avg_factor is None:
        return total / max(rows, 1)
    if isinstance(avg_factor, Tensor):
        avg_factor = avg_factor.detach().reshape(()).to(total.dtype)
        return total / torch.where(avg_factor > 0, avg_factor, torch.ones_like(avg_factor))
    return total / (avg_factor if avg_factor > 0 else 1)


class LongTailLoss(nn.Module):
    """Base of the classification losses: arguments, targets, widths, reduction, scores.

    Sub-classes implement :meth:`loss_sum` (fast: integer labels, row weights) and
    :meth:`loss_entries` (general: soft targets, entry weights, no reduction).

    Args:
        use_sigmoid: Must be True for sigmoid losses. Dense heads read this key *from the config*
            to choose the width of the classifier, so write it there.
        num_classes: C. Usually left out: RoI heads, the statistics or the checkpoint tell it.
        reduction: 'none', 'mean' or 'sum'.
        loss_weight: Factor of the loss.
        prior_prob: Foreground probability π the classifier of an RoI head should start from:
            ``ClassStatisticsHook`` sets its bias to ``-log((1 - π) / π)``. None leaves the head's
            own initialisation.
        class_statistics: Statistics file, annotation file or dict; only where no
            ``ClassStatisticsHook`` injects those of the training set.

    Raises:
        InputError: An argument contradicts the loss.
    """

    layout = 'classes'
    #: Names of the persistent buffers, each (C,).
    state_names: tuple[str, ...] = ()
    custom_cls_channels = True
    custom_activation = True
    custom_accuracy = True

    def __init__(
        self,
        use_sigmoid: bool = True,
        num_classes: int | None = None,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
        prior_prob: float | None = None,
        class_statistics: Any = None,
    ) -> None:
        super().__init__()
        if not use_sigmoid:
            raise InputError(
                f'{self.name} is a sigmoid loss: set `loss_cls.use_sigmoid=True`, found '
                f'{use_sigmoid!r}.'
            )
        self._check_reduction(reduction)
        if prior_prob is not None and not 0 < prior_prob < 1:
            raise InputError(
                f'`loss_cls.prior_prob` of {self.name} must lie in (0, 1), found {prior_prob}.'
            )
        self.use_sigmoid = True
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.prior_prob = prior_prob
        self.context = 'dense'
        #: `num_classes` as written in the config, kept for the comparison before training.
        self.given_num_classes = num_classes
        self._num_classes: int | None = None
        if num_classes is not None:
            self._set_num_classes(int(num_classes), '`loss_cls.num_classes`')
        if class_statistics is not None:
            stats = ClassStatistics.from_any(class_statistics, key='loss_cls.class_statistics')
            self.set_class_statistics(stats)

    @property
    def name(self) -> str:
        """Class name, for messages."""
        return type(self).__name__

    @property
    def num_classes(self) -> int:
        """C. Absent (AttributeError) until the head, the statistics or a checkpoint tell it."""
        if self._num_classes is None:
            raise AttributeError(f'{self.name} does not know its number of classes yet')
        return self._num_classes

    def _set_num_classes(self, num_classes: int, source: str) -> None:
        if num_classes < 1:
            raise InputError(f'{source} must be at least 1 for {self.name}, found {num_classes}.')
        if self._num_classes is None:
            self._num_classes = num_classes
            self.size_buffers(num_classes)
        elif self._num_classes != num_classes:
            raise InputError(
                f'{source} says {num_classes} classes but {self.name} was set up for '
                f'{self._num_classes}: make `num_classes` of the head, of `loss_cls` and the '
                'classes of the data set agree.'
            )

    # ---- for sub-classes -------------------------------------------------------------------

    def size_buffers(self, num_classes: int) -> None:
        """Create the buffers of the loss once C is known."""

    def take_statistics(self, stats: ClassStatistics) -> None:
        """Turn class statistics into buffers."""

    def loss_sum(self, z: Tensor, label: Tensor, row_weight: Tensor | None, count: bool) -> Tensor:
        """Sum over rows and columns, 0-d; ``count``: whether to update running statistics."""
        raise NotImplementedError

    def loss_entries(
        self, z: Tensor, target: Tensor, is_fg: Tensor, weight: Tensor | None, count: bool
    ) -> Tensor:
        """Weighted loss of every entry, (N, K); ``target`` (N, K), ``is_fg`` (N,) bool."""
        raise NotImplementedError

    # ---- statistics ------------------------------------------------------------------------

    def set_class_statistics(self, stats: ClassStatistics) -> None:
        """Marker method: ``ClassStatisticsHook`` calls it with the training set's statistics."""
        self._set_num_classes(stats.num_classes, f'the statistics of {stats.source}')
        self.take_statistics(stats)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # A loss built without a class count takes it from the checkpoint, so that testing needs
        # neither annotations nor the hook.
        if self._num_classes is None:
            sizes = {
                len(value)
                for key, value in state_dict.items()
                if key in {prefix + name for name in self.state_names}
            }
            if len(sizes) == 1 and (size := sizes.pop()) > 0:
                self._set_num_classes(size, 'the checkpoint')
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- what heads ask --------------------------------------------------------------------

    def get_cls_channels(self, num_classes: int) -> int:
        """Width of an RoI head's classifier; also tells the loss that an RoI head owns it."""
        self.context = 'roi'
        if self.given_num_classes not in (None, num_classes):
            # ClassStatisticsHook knows the third number, that of the data set, and stops the run
            # with all of them; without the hook the first forward stops at the width.
            return num_classes + (self.layout == 'classes+objectness')
        self._set_num_classes(num_classes, '`num_classes` of the RoI head')
        return num_classes + (self.layout == 'classes+objectness')

    def has_objectness(self, num_columns: int) -> bool:
        """Whether the last of ``num_columns`` columns is the objectness of background."""
        return (
            self.layout == 'classes+objectness'
            and self._num_classes is not None
            and num_columns == self._num_classes + 1
        )

    def check_width(self, cls_score: Tensor) -> None:
        """Raise InputError unless K, the width of the logits, fits C and the layout."""
        num_columns = cls_score.shape[-1]
        if self._num_classes is None:
            # Nobody told: a dense head, whose width is C when `use_sigmoid=True` is written.
            self._set_num_classes(num_columns, 'the classifier')
            self.to(cls_score.device)
        if num_columns == self._num_classes or self.has_objectness(num_columns):
            return
        wanted = f'{self._num_classes}'
        if self.layout == 'classes+objectness':
            wanted += f' (dense head) or {self._num_classes + 1} (RoI head)'
        raise InputError(
            f'{self.name} expects {wanted} logits a row, found {num_columns}: in a dense head '
            'write `loss_cls.use_sigmoid=True`, in an RoI head use one that asks the loss for its '
            'width (Shared2FCBBoxHead, ConvFCBBoxHead), and make `num_classes` agree.'
        )

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores at test: (N, C + 1) with background last in RoI heads, (N, C) in dense heads."""
        self.check_width(cls_score)
        scores = cls_score.to(compute_dtype(cls_score)).sigmoid()
        if self.has_objectness(cls_score.shape[-1]):
            background = scores[..., -1:]
            return torch.cat([scores[..., :-1] * (1 - background), background], dim=-1)
        if self.context == 'roi':
            return torch.cat([scores, torch.zeros_like(scores[..., :1])], dim=-1)
        return scores

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``{'acc': percent of rows whose best column is the label}``, 0-d, float32.

        Without an objectness column a row counts as background when no class reaches 0.5.
        """
        if len(labels) == 0:
            return dict(acc=cls_score.new_zeros((), dtype=torch.float32))
        with torch.no_grad():
            self.check_width(cls_score)
            num_classes = self.num_classes
            # Sigmoid keeps the order, so the best class needs one maximum over the logits only.
            best, predicted = cls_score[:, :num_classes].float().max(1)
            best, background = best.sigmoid(), best.new_tensor(0.5)
            if self.has_objectness(cls_score.shape[1]):
                background = cls_score[:, num_classes].float().sigmoid()
                best = best * (1 - background)
            predicted = predicted.masked_fill(best <= background, num_classes)
            outside = (labels < 0) | (labels > num_classes)
            wanted = labels.masked_fill(outside, num_classes)
            return dict(acc=(predicted == wanted).float().mean() * 100)

    # ---- the call --------------------------------------------------------------------------

    def _check_reduction(self, reduction: str) -> None:
        if reduction not in REDUCTIONS:
            raise InputError(
                f'`reduction` of {self.name} must be one of {REDUCTIONS}, found {reduction!r}.'
            )

    def forward(
        self,
        cls_score: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        weight: Tensor | None = None,
        avg_factor: int | float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Loss of a batch of rows.

        Args:
            cls_score: Logits, (N, K), any floating dtype.
            target: Labels (N,) int, where everything outside ``[0, C)`` is background; or a soft
                target (N, C) float; or ``(label, quality)``, both (N,).
            weight: None, (N,) or (N, K). Rows of weight 0 change neither loss nor statistics.
            avg_factor: Divisor of the sum for 'mean'; rows by default.
            reduction_override: Replaces ``reduction``; 'none' never updates statistics.

        Returns:
            0-d tensor, or (N, K) for 'none', in float32.

        Raises:
            InputError: Shapes or types outside of the contract, statistics missing.
        """
        reduction = reduction_override or self.reduction
        self._check_reduction(reduction)
        if cls_score.dim() != 2:
            raise InputError(
                f'{self.name} expects logits of shape (N, K), found {tuple(cls_score.shape)}.'
            )
        self.check_width(cls_score)
        count = self.training and torch.is_grad_enabled() and reduction != 'none'
        with torch.autocast(cls_score.device.type, enabled=False):
            return self.loss_weight * self._forward(
                cls_score, target, weight, avg_factor, reduction, count
            )

    def _forward(self, z, target, weight, avg_factor, reduction, count) -> Tensor:
        if weight is not None and weight.shape not in ((len(z),), z.shape):
            raise InputError(
                f'`weight` of {self.name} must have shape ({len(z)},) or {tuple(z.shape)}, found '
                f'{tuple(weight.shape)}.'
            )
        label, soft = self._split_target(z, target)
        if len(z) == 0:
            zero = z.to(compute_dtype(z)) * 0
            return zero if reduction == 'none' else zero.sum()
        fast = soft is None and reduction != 'none' and (weight is None or weight.dim() == 1)
        if fast:
            row_weight = None if weight is None else weight.detach()
            total = self.loss_sum(z, label, row_weight, count)
            return reduce_loss(total, len(z), avg_factor, reduction)
        if soft is None:
            soft = one_hot(label, z.shape[1], compute_dtype(z))
            is_fg = (label >= 0) & (label < self.num_classes)
        else:
            is_fg = (soft > 0).any(1)
        if weight is not None:
            weight = (weight[:, None] if weight.dim() == 1 else weight).detach()
            weight = weight.to(compute_dtype(z))
        entries = self.loss_entries(z, soft, is_fg, weight, count)
        if reduction == 'none':
            return entries
        return reduce_loss(entries.sum(), len(z), avg_factor, reduction)

    def _split_target(self, z: Tensor, target: Any) -> tuple[Tensor | None, Tensor | None]:
        """``(label, None)`` or ``(None, soft)``; background labels become C."""
        num_classes, rows = self.num_classes, len(z)
        quality = None
        if isinstance(target, (tuple, list)) and len(target) == 2:
            target, quality = target
        if not isinstance(target, Tensor) or len(target) != rows:
            found = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise InputError(f'{self.name} got {rows} rows of logits and the target {found}.')
        if target.dim() == 1 and not target.is_floating_point():
            label = target.long()
            label = label.masked_fill((label < 0) | (label > num_classes), num_classes)
            if quality is None:
                return label, None
            self._no_soft_objectness(z)
            soft = one_hot(label, num_classes, compute_dtype(z))
            return None, soft * quality.detach().to(soft.dtype)[:, None]
        if target.shape == (rows, num_classes) and quality is None:
            self._no_soft_objectness(z)
            return None, target.detach().to(compute_dtype(z))
        raise InputError(
            f'{self.name} takes labels ({rows},) int, soft targets ({rows}, {num_classes}) or '
            f'(label, quality), found {tuple(target.shape)} of {target.dtype}.'
        )

    def _no_soft_objectness(self, z: Tensor) -> None:
        if self.has_objectness(z.shape[1]):
            raise InputError(
                f'{self.name} with an objectness column takes integer labels only: soft targets '
                'say nothing about background; use it in a dense head.'
            )

    def extra_repr(self) -> str:
        return (
            f'num_classes={self._num_classes}, context={self.context}, reduction={self.reduction}, '
            f'loss_weight={self.loss_weight}'
        )
