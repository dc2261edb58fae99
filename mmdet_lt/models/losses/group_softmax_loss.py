r"""Group softmax loss (BAGS): softmax only among classes of similar frequency.

Paper: Li et al., *Overcoming Classifier Imbalance for Long-tail Object Detection with Balanced
Group Softmax*, CVPR 2020, https://arxiv.org/abs/2006.10408. Authors' code:
https://github.com/FishYuLi/BalancedGroupSoftmax.

.. math::
    L = \sum_{g=0}^{G} \frac{1}{|R_g|} \sum_{i \in R_g} s_i\,\mathrm{CE}(z_i^{(g)}, y_i^{(g)}),
    \qquad p_c = \mathrm{softmax}(z^{(g(c))})_c \cdot p_{fg}

Classes fall into G groups by their number of boxes, ``bin_split``. The columns of a group are
[others, its members in class order]; ``y^(g)`` is the member or others. The last group is
[foreground, background] and takes all rows. ``R_g`` of the others are the rows of members and
``β`` times as many rows drawn at random among the rest; a group without members in the batch has
none.

``avg_factor`` and the sum over groups: the rows of ``R_g`` have the factor ``A / |R_g|``, ``A`` the
rows whose weight is not 0. The ``avg_factor`` of RoI heads is ``A``, so the formula above is exact
there, and another divisor scales it as in any loss.

Differs from the authors' code: ``weight``, ``avg_factor`` and ``reduction_override`` are honoured
and rows of weight 0 are never drawn; rows are drawn on the device; groups come from the training
set and are saved in checkpoints, so testing needs no annotations. The order of columns is that of
the port in https://github.com/tztztztztz/eqlv2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import check_count, class_count
from mmdet_lt.models.losses.rows import Rows, one_hot
from mmdet_lt.models.losses.softmax_loss import SoftmaxLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import compute_dtype
from mmdet_lt.ops.softmax import grouped_softmax_loss, soft_grouped_softmax_loss
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def group_layout(group: np.ndarray, num_groups: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Where the classes are.

    Args:
        group: Group of each class, (C,).
        num_groups: G, without the group of background.

    Returns:
        ``(sizes, column, local)``: columns of each of the G + 1 groups; column of each class, (C,);
        label of each class and of background within each group, (C + 1, G + 1), 0 for others.
    """
    sizes = [*(1 + np.bincount(group, minlength=num_groups)).tolist(), 2]
    column = np.zeros(len(group))
    local = np.zeros((len(group) + 1, num_groups + 1))
    start = 0
    for number, size in enumerate(sizes[:-1]):
        members = np.flatnonzero(group == number)
        local[members, number] = np.arange(1, size)
        column[members] = start + np.arange(1, size)
        start += size
    local[-1, -1] = 1
    return sizes, column, local


def draw_rows(local: Tensor, beta: float, counted: Tensor) -> Tensor:
    """``R_g``: the rows of each group, bool (N, G + 1).

    Args:
        local: Label of each row within each group, 0 for others, (N, G + 1).
        beta: Rows of others for each row of a member.
        counted: Rows that may be drawn, bool (N,).
    """
    counted = counted.unsqueeze(1)
    member = (local[:, :-1] > 0) & counted
    # The first rows in the order of random keys; members come before all others.
    key = torch.rand(member.shape, device=local.device)
    key = key.masked_fill(~counted, 2).masked_fill(member, -1)
    rank = key.argsort(0).argsort(0)
    members = member.sum(0)
    wanted = members + (beta * members).floor()
    return torch.cat([(rank < wanted) & counted, counted], 1)


@MODELS.register_module()
class GroupSoftmaxLoss(SoftmaxLoss):
    """Balanced group softmax, see the formula above. For RoI heads only.

    Args:
        bin_split: Ascending bounds of the groups: the first holds the classes with fewer samples
            than the first bound, the last those with at least the last.
        beta: Rows of others for each row of a member, at least 0.
        count: Samples of a class: 'instance' for boxes, as in the paper, or 'image'.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, float32 (C,), saved in checkpoints: ``class_group``, the group of each class.

    Shapes: logits (N, C + 1 + G + 1) with G = ``len(bin_split) + 1`` groups of classes.
    """

    tags = LossTags(
        title='Group softmax',
        paper='CVPR 2020',
        url='https://arxiv.org/abs/2006.10408',
        statistics=True,
        stochastic=True,
        variants=(dict(bin_split=(500,)), dict(beta=0.5), dict(count='image')),
    )
    extra_columns_dense = None
    state_names = ('class_group',)

    def __init__(
        self,
        bin_split: Sequence[int] = (10, 100, 1000),
        beta: float = 8.0,
        count: str = 'instance',
        **kwargs: Any,
    ) -> None:
        bounds = tuple(bin_split)
        if not bounds or bounds[0] <= 0 or any(np.diff(bounds) <= 0):
            raise InputError(
                '`loss_cls.bin_split` of GroupSoftmaxLoss must be ascending numbers above 0, found '
                f'{bin_split!r}.'
            )
        if not 0 <= beta < math.inf:
            raise InputError(
                f'`loss_cls.beta` of GroupSoftmaxLoss must be at least 0, found {beta}.'
            )
        self.bin_split, self.beta = bounds, beta
        self.num_groups = len(bounds) + 1
        self.extra_columns = 2 + self.num_groups
        self.count = check_count('GroupSoftmaxLoss', count)
        super().__init__(**kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(class_group=num_classes)
        shapes = dict(
            class_column=(num_classes,), local_label=(num_classes + 1, 1 + self.num_groups)
        )
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape), persistent=False)
        self.group_sizes: list[int] = []

    def take_statistics(self, stats: ClassStatistics) -> None:
        samples = class_count(stats, self.count).numpy()
        self.fill_static(class_group=np.searchsorted(self.bin_split, samples, side='right'))
        self._lay_out()

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self._ready:
            self._lay_out()

    def _lay_out(self) -> None:
        """Column indices from ``class_group``, on the host, once."""
        group = self.class_group.cpu().numpy().astype(np.int64)
        if group.max() >= self.num_groups or group.min() < 0:
            raise InputError(
                f'the checkpoint of GroupSoftmaxLoss has class groups {group.min()} to '
                f'{group.max()}, `loss_cls.bin_split`={self.bin_split} makes {self.num_groups}: '
                'use that of the training.'
            )
        self.group_sizes, column, local = group_layout(group, self.num_groups)
        self.fill_static(class_column=column, local_label=local)

    def allowed_extra(self) -> tuple[int, ...]:
        return (self.extra_columns,)

    # ---- the loss --------------------------------------------------------------------------

    def row_losses(self, rows: Rows) -> Tensor:
        local = self.local_label.long()[rows.label]
        weight = rows.row_weight
        counted = torch.ones_like(rows.label, dtype=torch.bool) if weight is None else weight != 0
        drawn = draw_rows(local, self.beta, counted)
        factor = counted.sum() / drawn.sum(0).clamp_min(1)
        if rows.plain:
            losses = grouped_softmax_loss(rows.z, local, self.group_sizes)
        else:
            losses = soft_grouped_softmax_loss(rows.z, self._targets(rows), self.group_sizes)
        return losses.masked_fill(~drawn, 0) @ factor.to(losses.dtype)

    def _targets(self, rows: Rows) -> Tensor:
        """Soft targets of all columns, times the weight of the entries, (N, K)."""
        soft, background = rows.soft, rows.background
        if soft is None:
            soft = one_hot(rows.label, self.num_classes, compute_dtype(rows.z))
        foreground = soft.sum(1)
        if background is None:
            background = (1 - foreground).clamp_min(0)
        target = soft.new_zeros(rows.z.shape).index_copy_(1, self.class_column.long(), soft)
        *groups, last = target.split(self.group_sizes, 1)
        for part in groups:
            part[:, 0] = (foreground + background - part.sum(1)).clamp_min(0)
        last.copy_(torch.stack([foreground, background], 1))
        return target if rows.weight is None else target * rows.entry_weight

    def forward(
        self,
        cls_score: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        weight: Tensor | None = None,
        avg_factor: int | float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """As :meth:`LongTailLoss.forward`; a weight (N, C) is that of the classes' columns."""
        per_class = isinstance(weight, Tensor) and weight.dim() == 2 and self._ready
        if per_class and weight.shape == (len(cls_score), self.num_classes):
            # The columns of others and of the last group take the largest of the row.
            rest = weight.max(1, keepdim=True).values.expand(-1, sum(self.group_sizes))
            weight = rest.index_copy(1, self.class_column.long(), weight)
        return super().forward(cls_score, target, weight, avg_factor, reduction_override)

    # ---- scores ----------------------------------------------------------------------------

    def get_activation(self, cls_score: Tensor) -> Tensor:
        self.check_width(cls_score)
        self._check_ready()
        z = cls_score.to(compute_dtype(cls_score))
        parts = [torch.softmax(part, -1) for part in z.split(self.group_sizes, -1)]
        classes = torch.cat(parts, -1).index_select(-1, self.class_column.long())
        return torch.cat([classes * parts[-1][..., :1], parts[-1][..., 1:]], -1)

    def predict(self, cls_score: Tensor) -> Tensor:
        return self.get_activation(cls_score).argmax(1)
