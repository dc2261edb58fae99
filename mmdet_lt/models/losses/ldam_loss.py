r"""LDAM: label-distribution-aware margins.

Paper: Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*,
NeurIPS 2019, https://arxiv.org/abs/1906.07413. Authors' code: https://github.com/kaidic/LDAM-DRW.

.. math::
    L = \frac{1}{A} \sum_i s_i\,w_{y_i}\,\mathrm{CE}\big(a (z_i - \Delta_{y_i} e_{y_i}), y_i\big),
    \qquad \Delta_c = m \Big(\frac{n_{\min}}{n_c}\Big)^{1/4}, \quad \Delta_{bg} = 0

where ``n_c`` counts the boxes (or images) of class ``c``, ``m`` is ``max_margin``, ``a`` is
``scale``, ``s_i`` is ``weight`` and ``A`` is ``avg_factor``. Logits should be cosines: give the
box head ``cls_predictor_cfg=dict(type='mmdet_lt.CosineLinear', temperature=1.0, bias=False)``.
Scores at test are ``softmax(a z)`` without margins.

With ``beta`` the weights ``w`` are those of the class-balanced loss, which
``DeferredRebalancingHook`` switches on late in training: LDAM-DRW. Without, they are 1.

Differs from the authors' code: background, which images do not have, has margin 0 and weight 1; the
scale is also applied at test, where it decides how sure scores are; absent classes count as 1;
the divisor is ``avg_factor``, not the sum of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import check_count, class_count
from mmdet_lt.models.losses.class_balanced_loss import (
    check_effective_number,
    effective_number_weight,
)
from mmdet_lt.models.losses.reweighting import ClassReweighting, with_background
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.softmax_loss import SoftmaxLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.softmax import Adjustment, softmax_loss
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def ldam_margin(count: Tensor, max_margin: float = 0.5) -> Tensor:
    """``Δ`` of the classes, (C,), at most ``max_margin``; from counts of at least 1, (C,)."""
    return max_margin * (count.min() / count) ** 0.25


def subtract_margin(margin: Tensor, scale: float) -> Adjustment:
    """Adjustment of scaled logits: ``a Δ_y`` less at the label; ``margin`` is that of columns."""

    def adjust(x: Tensor, label: Tensor) -> Tensor:
        shift = (-scale * margin.to(x.dtype))[label]
        return x.scatter_add_(1, label.unsqueeze(1), shift.unsqueeze(1))

    return adjust


def ldam_loss(z: Tensor, label: Tensor, margin: Tensor, scale: float = 30.0) -> Tensor:
    """Loss of each row.

    Args:
        z: Logits (cosines), (N, K), any floating dtype.
        label: Column of each row, (N,) int64; outside ``[0, K)`` the row's loss is 0.
        margin: ``Δ`` of the columns, (K,) or longer.
        scale: ``a``.

    Returns:
        (N,), with gradient.
    """
    return softmax_loss(z, label, subtract_margin(margin, scale), scale)


@MODELS.register_module()
class LDAMLoss(ClassReweighting, SoftmaxLoss):
    """LDAM, see the formula above.

    Args:
        max_margin: ``m``, margin of the rarest class, at least 0.
        scale: ``a``, factor of the logits in training and at test, above 0.
        beta: β in [0, 1) of the class weights, 0.9999 in the paper's DRW; None for no weights.
            Without ``DeferredRebalancingHook`` they apply from the start.
        count: ``n_c``: 'instance' for boxes (rows of an RoI head are boxes) or 'image'.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffers, saved in checkpoints: ``margin`` (C + 1,), background last; with ``beta`` also
    ``balance_weight`` (C + 1,).

    Shapes: logits (N, C + 1) with background last, or (N, C); labels (N,). A row of soft targets
    has the margin of its largest one.
    """

    tags = LossTags(
        title='LDAM',
        paper='NeurIPS 2019',
        url='https://arxiv.org/abs/1906.07413',
        statistics=True,
        bounded_logits=True,
        variants=(dict(scale=1.0), dict(beta=0.9999), dict(max_margin=0.0, count='image')),
    )
    state_names = ('margin',)
    state_extra = 1

    def __init__(
        self,
        max_margin: float = 0.5,
        scale: float = 30.0,
        beta: float | None = None,
        count: str = 'instance',
        **kwargs: Any,
    ) -> None:
        if not 0 <= max_margin < math.inf or not 0 < scale < math.inf:
            raise InputError(
                '`loss_cls.max_margin` of LDAMLoss must be at least 0 and `loss_cls.scale` above '
                f'0, found {max_margin} and {scale}.'
            )
        if beta is not None:
            check_effective_number('LDAMLoss', beta, None)
            self.state_names = ('margin', 'balance_weight')
        self.max_margin, self.scale, self.beta = max_margin, scale, beta
        self.count = check_count('LDAMLoss', count)
        super().__init__(**kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(**dict.fromkeys(self.state_names, num_classes + 1))

    def take_statistics(self, stats: ClassStatistics) -> None:
        count = class_count(stats, self.count)
        values = dict(margin=with_background(ldam_margin(count, self.max_margin), 0.0))
        if self.beta is not None:
            weight = effective_number_weight(count, self.beta)
            values['balance_weight'] = with_background(weight)
        self.fill_static(**values)

    @property
    def set_rebalancing(self) -> Callable[[bool], None]:
        """Marker method: switch the class weights on or off; absent without ``beta``."""
        # The hook looks for this name and must not claim to switch what does not exist.
        if self.beta is None:
            raise AttributeError('set_rebalancing')
        return super().set_rebalancing

    def label_weight(self) -> Tensor | None:
        return None if self.beta is None else super().label_weight()

    def adjustment(self, rows: Rows) -> Adjustment:
        return subtract_margin(self.margin, self.scale)
