r"""Self-adjusting Dice loss (DSC) for classification.

Paper: Li et al., *Dice Loss for Data-imbalanced NLP Tasks*, ACL 2020,
https://arxiv.org/abs/1911.02855. Authors' code: https://github.com/ShannonAI/dice_loss_for_NLP.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j \big[ 1 - \frac{2 q_{ij} t_{ij} + \gamma}
        {q_{ij} + t_{ij} + \gamma} + \beta\,\mathrm{BCE}(z_{ij}, t_{ij}) \big], \qquad
    q = (1 - p)^\alpha\, p, \quad p = \sigma(z)

with ``α = alpha``, ``γ = smooth``, ``β = bce_weight``, ``s_i`` is ``weight`` and ``A`` is
``avg_factor``. ``(1 - p)^α`` takes the weight off easy entries. Its derivative is part of the
gradient, as in the paper; with ``u = dq/dz = p (1 - p)^α (1 - p - α p)``

.. math::
    \frac{dL_{ij}}{dz} = \frac{\gamma - 2 t (t + \gamma)}{(q + t + \gamma)^2}\, u
        + \beta (p - t)

The paper has ``β = 0``. Then both gradients are about proportional to ``p`` where ``p`` is small,
so that a classifier that starts at a small prior hardly learns; and ``u`` changes sign at
``p = 1 / (1 + α)``: a positive entry is drawn there, not to 1, and a negative one above it grows.
So here ``β`` is 1 by default.

Differs from the authors' code: every entry has its own fraction, as in the paper's text; theirs
sums over the batch before it divides, so that the loss of a row depends on the others.
MMDetection's ``DiceLoss`` is the fraction of a whole mask, for segmentation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.element_loss import ElementLoss
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.element import Element
from mmdet_lt.registry import MODELS


def dice_element(
    z: Tensor, target: Tensor, alpha: float = 1.0, smooth: float = 1.0, bce_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(l, dl/dz)`` of logits and targets in [0, 1], all of one shape, float32 or float64."""
    p, rest = torch.sigmoid(z), torch.sigmoid(-z)
    easy = rest.pow(alpha)
    q = easy * p
    whole = q + target + smooth
    # 1 - (2 q t + smooth) / whole without the cancellation
    loss = (q + target - 2 * q * target) / whole
    slope = (smooth - 2 * target * (target + smooth)) / whole.square() * q * (rest - alpha * p)
    if bce_weight:
        bce = F.binary_cross_entropy_with_logits(z, target, reduction='none')
        loss = loss + bce_weight * bce
        slope = slope + bce_weight * ((1 - target) * p - target * rest)
    return loss, slope


@MODELS.register_module()
class DiceLoss(ElementLoss):
    """Self-adjusting Dice loss, see the formula above.

    Args:
        alpha: Exponent α of the factor of easy entries; 0 is plain Dice.
        smooth: γ in numerator and denominator; entries without positives need it above 0.
        bce_weight: β, the weight of binary cross entropy beside the Dice part; paper 0.
        prior_prob: π the classifier of an RoI head starts from.
        kwargs: Arguments of :class:`LongTailLoss`.

    Shapes: logits (N, C) without a background column, labels (N,), ``weight`` (N,) or (N, C).
    """

    tags = LossTags(
        title='Self-adjusting Dice loss',
        paper='ACL 2020',
        url='https://arxiv.org/abs/1911.02855',
        variants=(dict(alpha=0.0, bce_weight=0.0), dict(alpha=0.5, smooth=0.1, bce_weight=0.5)),
    )

    def __init__(
        self,
        alpha: float = 1.0,
        smooth: float = 1.0,
        bce_weight: float = 1.0,
        prior_prob: float | None = 0.01,
        **kwargs: Any,
    ) -> None:
        if alpha < 0 or smooth <= 0 or bce_weight < 0:
            raise InputError(
                'DiceLoss takes `loss_cls.alpha` of at least 0, `loss_cls.smooth` above 0 and '
                f'`loss_cls.bce_weight` of at least 0, found {alpha}, {smooth} and {bce_weight}.'
            )
        self.alpha, self.smooth, self.bce_weight = alpha, smooth, bce_weight
        super().__init__(prior_prob=prior_prob, **kwargs)

    def element(self, rows: Rows) -> Element:
        alpha, smooth, bce_weight = self.alpha, self.smooth, self.bce_weight
        return lambda z, target: dice_element(z, target, alpha, smooth, bce_weight)
