r"""Balanced sigmoid loss (the detection loss of BALMS).

Paper: Ren et al., *Balanced Meta-Softmax for Long-Tailed Visual Recognition*, NeurIPS 2020,
https://arxiv.org/abs/2007.10740. Authors' code:
https://github.com/cunjunyu/BalancedMetaSoftmax-InstanceSeg.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_j \mathrm{BCE}(z_{ij} + E_i b_j, t_{ij}), \qquad
    b_j = \log \frac{f_j}{1 - f_j}

where ``E_i`` is 1 for a foreground row, ``f_j`` is the image frequency of the class, ``s_i`` is
``weight`` and ``A`` is ``avg_factor``. In training the prior log-odds stand in for what the
classifier would otherwise learn, so the logits, which are all that counts at test (``σ(z)``), are
free of the prior: tail classes are pushed up as positives and hardly down as negatives of other
classes. Background rows keep their logits.

Differs from the authors' code: logits are not changed in place, ``weight`` and ``avg_factor`` are
honoured. ``f_j`` counts at least one image with the class and at least one without, since the
log-odds of 0 and 1 are infinite.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, sigmoid_terms_loss
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def prior_log_odds(image_count: np.ndarray, num_images: int) -> np.ndarray:
    """``log(f / (1 - f))``, (C,), of the images that contain each class, (C,), of all images."""
    without = num_images - np.asarray(image_count)
    return np.log(np.maximum(image_count, 1)) - np.log(np.maximum(without, 1))


def balanced_sigmoid_terms(log_odds: Tensor) -> SigmoidTerms:
    """Constants of the engine."""
    ones, zeros = torch.ones_like(log_odds), torch.zeros_like(log_odds)
    return SigmoidTerms(ones, ones, shift=log_odds, shift_bg=zeros)


def balanced_sigmoid_loss(
    z: Tensor, label: Tensor, log_odds: Tensor, row_weight: Tensor | None = None
) -> Tensor:
    """Summed balanced sigmoid loss.

    Args:
        z: Logits, (N, C), any floating dtype.
        label: Class of each row, (N,) int64; outside ``[0, C)``: background.
        log_odds: ``b``, (C,).
        row_weight: ``s_i``, (N,).

    Returns:
        Sum over rows and columns, 0-d.
    """
    return sigmoid_terms_loss(z, label, balanced_sigmoid_terms(log_odds), row_weight)[0]


@MODELS.register_module()
class BalancedSigmoidLoss(SigmoidLoss):
    """Balanced sigmoid loss, see the formula above.

    Args:
        prior_prob: π the classifier of an RoI head starts from, paper 0.001.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``log_odds`` (C,).

    Shapes: logits (N, C) without a background column, labels (N,), ``weight`` (N,) or (N, C).
    """

    tags = LossTags(
        title='Balanced sigmoid (BALMS)',
        paper='NeurIPS 2020',
        url='https://arxiv.org/abs/2007.10740',
        statistics=True,
    )
    state_names = ('log_odds',)

    def __init__(self, prior_prob: float | None = 0.001, **kwargs: Any) -> None:
        super().__init__(prior_prob=prior_prob, **kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(log_odds=num_classes)

    def take_statistics(self, stats: ClassStatistics) -> None:
        self.fill_static(log_odds=prior_log_odds(stats.image_count, stats.num_annotated_images))

    def terms(self, rows: Rows) -> SigmoidTerms:
        return balanced_sigmoid_terms(self.log_odds)
