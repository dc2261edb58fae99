r"""Class-balanced cross entropy: rows weighted by the inverse effective number of samples.

Paper: Cui et al., *Class-Balanced Loss Based on Effective Number of Samples*, CVPR 2019,
https://arxiv.org/abs/1901.05555. Authors' code:
https://github.com/richardaecn/class-balanced-loss.

.. math::
    L = \frac{1}{A} \sum_i s_i\,w_{y_i}\,\mathrm{CE}(z_i, y_i), \qquad
    w_c = C\,\frac{u_c}{\sum_k u_k}, \quad u_c = \frac{1 - \beta}{1 - \beta^{n_c}}, \quad w_{bg} = 1

where ``n_c`` counts the boxes (or images) of class ``c``, ``s_i`` is ``weight`` and ``A`` is
``avg_factor``. ``β = 0`` weighs all classes alike, ``β → 1`` by ``1 / n_c``.

Differs from the authors' code: background rows, which images do not have, keep weight 1; the
divisor is ``avg_factor``, not the sum of weights; ``1 - β^n`` is computed as ``-expm1(n log β)``,
which keeps its digits when ``β`` is close to 1; absent classes count as 1. The sigmoid form is
``ClassBalancedFocalLoss``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import check_count, class_count
from mmdet_lt.models.losses.reweighting import ClassReweighting, with_background
from mmdet_lt.models.losses.softmax_loss import SoftmaxLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def effective_number_weight(
    count: Tensor, beta: float = 0.9999, max_weight: float | None = None
) -> Tensor:
    """``w`` of the classes, (C,), from counts of at least 1, (C,).

    The weights sum to C before those above ``max_weight`` are cut.
    """
    log_beta = torch.tensor(beta, dtype=count.dtype).log()  # β = 0 gives -inf, hence u = 1
    weight = (1 - beta) / -torch.expm1(count * log_beta)
    weight = weight * (len(count) / weight.sum())
    return weight if max_weight is None else weight.clamp(max=max_weight)


def check_effective_number(name: str, beta: float, max_weight: float | None) -> None:
    """Raise InputError unless the arguments of :func:`effective_number_weight` make sense."""
    if not 0 <= beta < 1:
        raise InputError(f'`loss_cls.beta` of {name} must lie in [0, 1), found {beta}.')
    if max_weight is not None and not 0 < max_weight < math.inf:
        raise InputError(
            f'`loss_cls.max_weight` of {name} must be above 0 or None, found {max_weight}.'
        )


@MODELS.register_module()
class ClassBalancedLoss(ClassReweighting, SoftmaxLoss):
    """Class-balanced cross entropy, see the formula above.

    ``DeferredRebalancingHook`` can switch the weights on later in training (DRW).

    Args:
        beta: β in [0, 1).
        max_weight: Largest weight of a class, against the noise of classes with few boxes; None
            cuts nothing.
        count: ``n_c``: 'instance' for boxes (rows of an RoI head are boxes) or 'image'.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``balance_weight`` (C + 1,), background last.

    Shapes: logits (N, C + 1) with background last, or (N, C); labels (N,).
    """

    tags = LossTags(
        title='Class-balanced loss',
        paper='CVPR 2019',
        url='https://arxiv.org/abs/1901.05555',
        statistics=True,
        variants=(dict(beta=0.0), dict(beta=0.99, max_weight=2.0, count='image')),
    )
    state_names = ('balance_weight',)
    state_extra = 1

    def __init__(
        self,
        beta: float = 0.9999,
        max_weight: float | None = None,
        count: str = 'instance',
        **kwargs: Any,
    ) -> None:
        check_effective_number('ClassBalancedLoss', beta, max_weight)
        self.beta, self.max_weight = beta, max_weight
        self.count = check_count('ClassBalancedLoss', count)
        super().__init__(**kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(balance_weight=num_classes + 1)

    def take_statistics(self, stats: ClassStatistics) -> None:
        count = class_count(stats, self.count)
        weight = effective_number_weight(count, self.beta, self.max_weight)
        self.fill_static(balance_weight=with_background(weight))
