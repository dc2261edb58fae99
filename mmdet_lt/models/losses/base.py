"""The contract between MMDetection's heads and every classification loss of this package.

Letters: ``N`` rows, ``C`` foreground classes, ``K`` columns of logits. Background label: ``C``.

RoI heads ask :meth:`LongTailLoss.get_cls_channels` while they are built, dense heads never do.
That call is how a loss knows its context: scores of an RoI head need ``C + 1`` columns with
background last, scores of a dense head exactly ``C``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from mmengine.logging import MessageHub, print_log
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.rows import Rows, align_weight, loss_divisor, split_target
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import compute_dtype
from mmdet_lt.statistics import ClassStatistics

REDUCTIONS = ('none', 'mean', 'sum')


@functools.cache
def _tell_unchecked(name: str) -> None:
    """Warn once; the hook, not the loss, knows the head and the data set."""
    print_log(
        f'{name} trains without ClassStatisticsHook: nothing checks that its head trains and '
        "scores by it. Add `custom_hooks=[dict(type='mmdet_lt.ClassStatisticsHook')]`.",
        logger='current',
        level=logging.WARNING,
    )


class LongTailLoss(nn.Module):
    """Base of the classification losses: arguments, targets, widths, reduction, statistics.

    Methods sub-class :class:`SigmoidLoss` or :class:`SoftmaxLoss`, which bring the engine.

    Args:
        use_sigmoid: Must say what the loss is. Dense heads read this key *from the config* to
            choose the width of the classifier, so write it there.
        num_classes: C. Usually left out: RoI heads, the statistics or the checkpoint tell it.
        reduction: 'none', 'mean' or 'sum'.
        loss_weight: Factor of the loss.
        class_weight: Fixed factor of the rows (softmax) or positive entries (sigmoid) of each
            class: a number for all classes, a list of C, or of C + 1 with background last.
        prior_prob: Foreground probability π the classifier of an RoI head should start from:
            ``ClassStatisticsHook`` sets its bias to :meth:`prior_bias`. None leaves the head's own
            initialisation.
        class_statistics: Statistics file, annotation file or dict; only where no
            ``ClassStatisticsHook`` injects those of the training set.
        detect_anomaly: Stop with an error at the first logit or loss that is not finite, before
            any state learns from it. Costs one synchronisation a call.

    Raises:
        InputError: An argument contradicts the loss.
    """

    tags: ClassVar[LossTags]
    #: What ``use_sigmoid`` is.
    sigmoid: ClassVar[bool]
    #: Columns beside the C classes in RoI heads, and in dense heads (None: not for dense heads).
    extra_columns: int = 0
    extra_columns_dense: int | None = 0
    #: Names of the persistent buffers that hold one value per class, and their length minus C.
    state_names: tuple[str, ...] = ()
    state_extra = 0
    custom_cls_channels = True
    custom_activation = True
    custom_accuracy = True

    def __init__(
        self,
        use_sigmoid: bool | None = None,
        num_classes: int | None = None,
        reduction: str = 'mean',
        loss_weight: float = 1.0,
        class_weight: float | Sequence[float] | None = None,
        prior_prob: float | None = None,
        class_statistics: Any = None,
        detect_anomaly: bool = False,
    ) -> None:
        super().__init__()
        if use_sigmoid is not None and bool(use_sigmoid) != self.sigmoid:
            raise InputError(
                f'{self.name} is a {"sigmoid" if self.sigmoid else "softmax"} loss: set '
                f'`loss_cls.use_sigmoid={self.sigmoid}`, found {use_sigmoid!r}.'
            )
        self._check_reduction(reduction)
        if prior_prob is not None and not 0 < prior_prob < 1:
            raise InputError(
                f'`loss_cls.prior_prob` of {self.name} must lie in (0, 1), found {prior_prob}.'
            )
        self.use_sigmoid = self.sigmoid
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.class_weight = class_weight
        self.prior_prob = prior_prob
        self.detect_anomaly = detect_anomaly
        self.context = 'dense'
        #: Name of the module within the model, for messages; the hook sets it.
        self.where = ''
        #: `num_classes` as written in the config, kept for the comparison before training.
        self.given_num_classes = num_classes
        self._num_classes: int | None = None
        self._ready = not self.tags.statistics
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
            self._size_class_weight(num_classes)
            self.size_buffers(num_classes)
        elif self._num_classes != num_classes:
            raise InputError(
                f'{source} says {num_classes} classes but {self.name} was set up for '
                f'{self._num_classes}: make `num_classes` of the head, of `loss_cls` and the '
                'classes of the data set agree.'
            )

    def _size_class_weight(self, num_classes: int) -> None:
        """Buffer (C + 1,) of ``class_weight``, background last; not part of checkpoints."""
        given = self.class_weight
        if given is None:
            return
        values = torch.as_tensor(given, dtype=torch.float32).flatten()
        if values.numel() == 1:
            values = values.expand(num_classes)
        if len(values) == num_classes:
            values = torch.cat([values, values.new_ones(1)])
        if len(values) != num_classes + 1 or not bool((values >= 0).all()):
            raise InputError(
                f'`loss_cls.class_weight` of {self.name} must be a number or a list of '
                f'{num_classes} or {num_classes + 1} (background last) numbers of at least 0, '
                f'found {given!r}.'
            )
        self.register_buffer('fixed_weight', values.clone(), persistent=False)

    # ---- for sub-classes -------------------------------------------------------------------

    def size_buffers(self, num_classes: int) -> None:
        """Create the buffers of the loss once C is known."""

    def take_statistics(self, stats: ClassStatistics) -> None:
        """Turn class statistics into buffers."""

    def compute(self, rows: Rows) -> Tensor:
        """Weighted loss: of every entry or row if ``rows.per_entry``, else also summed, 0-d."""
        raise NotImplementedError

    def prior_bias(self) -> float | None:
        """Bias that gives a classifier the foreground probability ``prior_prob``."""
        raise NotImplementedError

    def declare_static(self, **sizes: int) -> None:
        """Register buffers, given by length, that the statistics or a checkpoint will fill."""
        for name, size in sizes.items():
            # NaN marks "never set".
            self.register_buffer(name, torch.full((size,), float('nan')))

    def fill_static(self, **values: Any) -> None:
        """Write the buffers of :meth:`declare_static`."""
        for name, value in values.items():
            old = getattr(self, name)
            new = torch.as_tensor(value, dtype=torch.float32)
            setattr(self, name, new.to(old.device).reshape(old.shape))

    # ---- statistics ------------------------------------------------------------------------

    def set_class_statistics(self, stats: ClassStatistics) -> None:
        """Marker method: ``ClassStatisticsHook`` calls it with the training set's statistics."""
        self._set_num_classes(stats.num_classes, f'the statistics of {stats.source}')
        self.take_statistics(stats)
        self._ready = True

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        *_, problems = args
        mine = {
            name: state_dict[prefix + name]
            for name in self.state_names
            if prefix + name in state_dict
        }
        # A loss built without a class count takes it from the checkpoint, so that testing needs
        # neither annotations nor the hook.
        if self._num_classes is None:
            sizes = {len(value) - self.state_extra for value in mine.values()}
            if len(sizes) == 1 and (size := sizes.pop()) > 0:
                self._set_num_classes(size, 'the checkpoint')
        self._tell_other_count(prefix, mine, problems)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.tags.statistics and mine:
            self._ready = all(bool(torch.isfinite(value).all()) for value in mine.values())

    def _tell_other_count(self, prefix: str, state: dict[str, Tensor], problems: list) -> None:
        """Say in one sentence what torch says as several shapes that do not fit."""
        found = {len(value) - self.state_extra for value in state.values()}
        if self._num_classes is not None and found - {self._num_classes}:
            counts = ' or '.join(map(str, sorted(found - {self._num_classes})))
            problems.append(
                f'{self.name} (`{prefix[:-1]}`) of the checkpoint has statistics of {counts} '
                f'classes, `num_classes` of this model is {self._num_classes}: they are not '
                'loaded; make the class counts agree to go on from them.\n'
            )

    def _check_ready(self) -> None:
        if not self._ready:
            raise InputError(
                f'{self.name} has no class statistics: add '
                "`custom_hooks=[dict(type='mmdet_lt.ClassStatisticsHook')]` or give "
                '`loss_cls.class_statistics` an annotation or statistics file.'
            )
        if self.training and not self.where:
            _tell_unchecked(self.name)

    # ---- what heads ask --------------------------------------------------------------------

    def get_cls_channels(self, num_classes: int) -> int:
        """Width of an RoI head's classifier; also tells the loss that an RoI head owns it."""
        self.context = 'roi'
        # If three numbers disagree, ClassStatisticsHook, which knows that of the data set, stops
        # the run with all of them; without the hook the first forward stops at the width.
        if self.given_num_classes in (None, num_classes):
            self._set_num_classes(num_classes, '`num_classes` of the RoI head')
        return num_classes + self.extra_columns

    def dense_columns(self, num_classes: int) -> int | None:
        """Width a dense head's classifier must have; None if dense heads cannot use the loss."""
        if self.extra_columns_dense is None:
            return None
        return num_classes + self.extra_columns_dense

    def allowed_extra(self) -> tuple[int, ...]:
        """Columns beside the classes that logits may have."""
        dense = () if self.extra_columns_dense is None else (self.extra_columns_dense,)
        return tuple(sorted({*dense, self.extra_columns}))

    def check_width(self, cls_score: Tensor) -> None:
        """Raise InputError unless K, the width of the logits, fits C and the layout."""
        num_columns = cls_score.shape[-1]
        if self._num_classes is None:
            # Nobody told: a dense head.
            dense = self.extra_columns_dense
            extra = self.extra_columns if dense is None else dense
            self._set_num_classes(num_columns - extra, 'the classifier')
            self.to(cls_score.device)
        allowed = self.allowed_extra()
        if num_columns - self._num_classes in allowed:
            return
        wanted = ' or '.join(str(self._num_classes + extra) for extra in allowed)
        if self.extra_columns_dense not in (None, self.extra_columns):
            dense, roi = (
                self._num_classes + e for e in (self.extra_columns_dense, self.extra_columns)
            )
            wanted = f'{dense} (dense head) or {roi} (RoI head)'
        raise InputError(
            f'{self.name} expects {wanted} logits a row, found {num_columns}: in a dense head '
            f'write `loss_cls.use_sigmoid={self.sigmoid}`, in an RoI head use one that asks the '
            'loss for its width (Shared2FCBBoxHead, ConvFCBBoxHead), and make `num_classes` agree.'
        )

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Scores at test: (N, C + 1) with background last in RoI heads, (N, C) in dense heads."""
        raise NotImplementedError

    def predict(self, cls_score: Tensor) -> Tensor:
        """Label of the best column of each row, C for background, int64 (N,)."""
        raise NotImplementedError

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``{'acc': percent of rows whose best column is the label}``, 0-d, float32."""
        if len(labels) == 0:
            return dict(acc=cls_score.new_zeros((), dtype=torch.float32))
        with torch.no_grad():
            self.check_width(cls_score)
            outside = (labels < 0) | (labels > self.num_classes)
            wanted = labels.masked_fill(outside, self.num_classes)
            return dict(acc=(self.predict(cls_score) == wanted).float().mean() * 100)

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
                target (N, C) float, or (N, C + 1) with background last; or ``(label, quality)``,
                both (N,).
            weight: None, (N,), (N, K) or (N, C). Rows of weight 0 change neither loss nor
                statistics.
            avg_factor: Divisor of the sum for 'mean'; rows by default.
            reduction_override: Replaces ``reduction``; 'none' never updates statistics.

        Returns:
            0-d tensor in float32; for 'none' (N, K) from sigmoid losses, (N,) from softmax losses.

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
        self._check_ready()
        if self.detect_anomaly:
            self._check_finite('logits', cls_score)
        label, soft, background = split_target(self.name, cls_score, target, self.num_classes)
        rows = Rows(
            z=cls_score,
            label=label,
            num_classes=self.num_classes,
            soft=soft,
            background=background,
            weight=align_weight(self.name, cls_score, weight, self.num_classes),
            divisor=loss_divisor(avg_factor, reduction, len(label), compute_dtype(cls_score)),
            count=self.training and torch.is_grad_enabled() and reduction != 'none',
            per_entry=reduction == 'none',
        )
        with torch.autocast(cls_score.device.type, enabled=False):
            loss = self.compute(rows) if len(label) else self._empty(rows)
            loss = self.loss_weight * (loss if rows.per_entry else loss / rows.divisor)
        if self.detect_anomaly:
            self._check_finite('losses', loss)
        return loss

    def _empty(self, rows: Rows) -> Tensor:
        """Zero that keeps the graph, so that every rank has a gradient for its classifier."""
        zero = rows.z.to(compute_dtype(rows.z)) * 0
        if not rows.per_entry:
            return zero.sum()
        return zero if self.sigmoid else zero.sum(1)

    def _check_finite(self, what: str, values: Tensor) -> None:
        finite = torch.isfinite(values.detach())
        if bool(finite.all()):
            return
        iteration = MessageHub.get_current_instance().get_info('iter', default='unknown')
        raise InputError(
            f'{int((~finite).sum())} of {values.numel()} {what} of `{self.where or self.name}` '
            f'({self.name}) are NaN or infinite in iteration {iteration}: lower the learning rate, '
            'clip gradients (`optim_wrapper.clip_grad`) or check the boxes of the data set.'
        )

    def extra_repr(self) -> str:
        return (
            f'num_classes={self._num_classes}, context={self.context}, reduction={self.reduction}, '
            f'loss_weight={self.loss_weight}'
        )
