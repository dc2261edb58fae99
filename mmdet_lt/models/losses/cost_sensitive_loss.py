r"""Cost-sensitive cross entropy: rows weighted by a power of the inverse class count.

Paper (one of the tricks it compares): Zhang et al., *Bag of Tricks for Long-Tailed Visual
Recognition with Deep Convolutional Neural Networks*, AAAI 2021,
https://github.com/zhangyongshun/BagofTricks-LT.

.. math::
    L = \frac{1}{A} \sum_i s_i\,w_{y_i}\,\mathrm{CE}(z_i, y_i), \qquad
    w_c = \Big(\frac{n_{\min}}{n_c}\Big)^{\gamma}, \quad w_{bg} = w_b

where ``n_c`` counts the boxes (or images) of class ``c``, ``n_min`` is the smallest count, ``w_b``
is ``background_weight``, ``s_i`` is ``weight`` and ``A`` is ``avg_factor``.

Differs from the authors' code: there the loss is divided by the sum of the weights in the batch,
so that their scale cancels. Here the divisor is ``avg_factor``, so the scale stays: no class weighs
more than 1, frequent ones far less. With background at 1 that leaves foreground little say, hence
``background_weight`` and ``loss_weight``. Absent classes count as 1.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import check_count, class_count
from mmdet_lt.models.losses.reweighting import ClassReweighting, with_background
from mmdet_lt.models.losses.softmax_loss import SoftmaxLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def cost_sensitive_weight(count: Tensor, gamma: float = 1.0) -> Tensor:
    """``w`` of the classes, (C,) in (0, 1], from counts of at least 1, (C,)."""
    return (count.min() / count) ** gamma


@MODELS.register_module()
class CostSensitiveLoss(ClassReweighting, SoftmaxLoss):
    """Cost-sensitive cross entropy, see the formula above.

    ``DeferredRebalancingHook`` can switch the weights, background's too, on later (DRW).

    Args:
        gamma: Exponent γ of at least 0: 1 for inverse counts, 0.5 for their roots, 0 for none.
        background_weight: ``w_b``, at least 0.
        count: ``n_c``: 'instance' for boxes (rows of an RoI head are boxes) or 'image'.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``balance_weight`` (C + 1,), background last.

    Shapes: logits (N, C + 1) with background last, or (N, C); labels (N,).
    """

    tags = LossTags(
        title='Cost-sensitive cross entropy',
        paper='AAAI 2021',
        url='https://github.com/zhangyongshun/BagofTricks-LT',
        statistics=True,
        variants=(dict(gamma=0.0), dict(gamma=0.5, background_weight=0.1, count='image')),
    )
    state_names = ('balance_weight',)
    state_extra = 1

    def __init__(
        self,
        gamma: float = 1.0,
        background_weight: float = 1.0,
        count: str = 'instance',
        **kwargs: Any,
    ) -> None:
        for key, value in (('gamma', gamma), ('background_weight', background_weight)):
            if not 0 <= value < math.inf:
                raise InputError(
                    f'`loss_cls.{key}` of CostSensitiveLoss must be at least 0, found {value}.'
                )
        self.gamma, self.background_weight = gamma, background_weight
        self.count = check_count('CostSensitiveLoss', count)
        super().__init__(**kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(balance_weight=num_classes + 1)

    def take_statistics(self, stats: ClassStatistics) -> None:
        weight = cost_sensitive_weight(class_count(stats, self.count), self.gamma)
        self.fill_static(balance_weight=with_background(weight, self.background_weight))
