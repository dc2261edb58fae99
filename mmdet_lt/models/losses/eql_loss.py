r"""Equalization loss (EQL).

Paper: Tan et al., *Equalization Loss for Long-Tailed Object Recognition*, CVPR 2020,
https://arxiv.org/abs/2003.05176. Authors' code: https://github.com/tztztztztz/eql.detectron2.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j w_{ij}\,\mathrm{BCE}(z_{ij}, t_{ij}), \qquad
    w_{ij} = 1 - E_i\, T_\lambda(f_j)\, (1 - t_{ij})

where ``E_i`` is 1 for a foreground row, ``T_λ(f_j)`` is 1 when the image frequency ``f_j`` of the
class is below ``lambda_``, ``s_i`` is ``weight`` and ``A`` is ``avg_factor``. Foreground rows of
other classes thus no longer push tail classes down; background rows still do.

Differs from the authors' code: ``weight``, ``avg_factor`` and ``reduction_override`` are honoured
(MMDetection's RoI heads pass the number of rows, which is the authors' divisor), frequencies are a
buffer and come from the training set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdet_lt.models.losses._tail import TailLoss
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, weighted_sigmoid_loss
from mmdet_lt.registry import MODELS


def equalization_loss(
    z: Tensor, label: Tensor, tail: Tensor, row_weight: Tensor | None = None
) -> Tensor:
    """Summed equalization loss.

    Args:
        z: Logits, (N, C), any floating dtype.
        label: Class of each row, (N,) int64; outside ``[0, C)``: background.
        tail: 1 for tail classes (``f_j < λ``), else 0, (C,).
        row_weight: ``s_i``, (N,).

    Returns:
        Sum over rows and columns, 0-d.
    """
    ones = torch.ones_like(tail)
    return weighted_sigmoid_loss(z, label, ones, 1 - tail, ones, row_weight)[0]


@MODELS.register_module()
class EQLLoss(TailLoss):
    """Equalization loss, see the formula above.

    Args:
        lambda_: Frequency threshold λ, a fraction of the annotated images. 1.1e-3 for LVIS v1
            (815 tail classes), 1.77e-3 for LVIS v0.5.
        prior_prob: π the classifier of an RoI head starts from, paper 0.001.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``tail`` (C,).

    Shapes: logits (N, C) without a background column, labels (N,), ``weight`` (N,) or (N, C).
    """

    tags = LossTags(
        title='Equalization loss',
        paper='CVPR 2020',
        url='https://arxiv.org/abs/2003.05176',
        statistics=True,
        variants=(dict(lambda_=0.0), dict(lambda_=1.0)),
    )

    def terms(self, rows: Rows) -> SigmoidTerms:
        ones = self.ones(rows)
        return SigmoidTerms(ones, 1 - self.tail, ones)
