r"""Federated loss: each call takes negatives from a sampled set of classes only.

Paper: Zhou et al., *Probabilistic two-stage detection* (CenterNet2), 2021,
https://arxiv.org/abs/2103.07461. Authors' code: https://github.com/xingyizhou/CenterNet2.

.. math::
    L = \frac{1}{A} \sum_i s_i \sum_{j \in S} \mathrm{BCE}(z_{ij}, t_{ij})

where ``s_i`` is ``weight``, ``A`` is ``avg_factor`` and ``S`` holds every class that some row of
the call is labelled with, filled up to ``num_sample_classes`` by classes drawn without
replacement with probability in proportion to ``n_c^power``, ``n_c`` the images of the class.
A rare class is thus pushed down in few calls, and in all those that contain it.

Every rank and every call draws its own set, as in the authors' code; a dense head calls once a
pyramid level. Differs from it: only foreground classes count towards the size of ``S`` (there and
in Detectron2 background takes one of the 50 places), classes of ignored rows (weight 0) are not
forced into ``S``, ``weight`` and ``avg_factor`` are honoured, and there is no column for
background. The authors' softmax variant masks nothing and is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses._counts import check_count, class_count
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.sigmoid import SigmoidTerms, weighted_sigmoid_loss
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics


def federated_classes(present: Tensor, sampling_weight: Tensor, num_sample_classes: int) -> Tensor:
    """The set ``S`` as a mask, bool (C,).

    Args:
        present: Classes that must be in ``S``, bool (C,).
        sampling_weight: Above 0, (C,); another class is drawn in proportion to it.
        num_sample_classes: Size of ``S``, unless more classes are present or C is smaller.
    """
    # The k first arrivals of exponential clocks with rates w are a draw without replacement.
    arrival = torch.empty_like(sampling_weight).exponential_() / sampling_weight
    arrival = arrival.masked_fill(present, -1.0)
    first = arrival.topk(min(num_sample_classes, len(present)), largest=False).indices
    return present.clone().scatter_(0, first, True)


def federated_loss(
    z: Tensor, label: Tensor, classes: Tensor, row_weight: Tensor | None = None
) -> Tensor:
    """Summed federated loss.

    Args:
        z: Logits, (N, C), any floating dtype.
        label: Class of each row, (N,) int64; outside ``[0, C)``: background.
        classes: The set ``S``, bool (C,); holds every label.
        row_weight: ``s_i``, (N,).

    Returns:
        Sum over rows and the columns of ``S``, 0-d.
    """
    mask = classes.to(torch.float32)
    return weighted_sigmoid_loss(z, label, mask, mask, None, row_weight)[0]


def present_classes(rows: Rows) -> Tensor:
    """Classes with a positive target in a row that counts, bool (C,)."""
    weight = rows.row_weight
    if rows.soft is not None:
        positive = rows.soft > 0
        return (positive if weight is None else positive & (weight != 0)[:, None]).any(0)
    label = rows.label
    if weight is not None:
        label = label.masked_fill(weight == 0, rows.num_classes)
    present = torch.zeros(rows.num_classes + 1, dtype=torch.bool, device=label.device)
    return present.index_fill_(0, label, True)[: rows.num_classes]


@MODELS.register_module()
class FederatedLoss(SigmoidLoss):
    """Federated loss, see the formula above.

    Args:
        num_sample_classes: Size of ``S``.
        power: Exponent of the counts.
        count: 'image' (paper) or 'instance': which count of a class ``n_c`` is. Classes without
            any sample count as 1.
        prior_prob: π the classifier of an RoI head starts from, paper 0.01.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, saved in checkpoints: ``sampling_weight`` (C,), ``n_c^power``.

    Shapes: logits (N, C) without a background column, labels (N,), ``weight`` (N,) or (N, C).
    """

    tags = LossTags(
        title='Federated loss',
        paper='arXiv 2021',
        url='https://arxiv.org/abs/2103.07461',
        statistics=True,
        stochastic=True,
        variants=(dict(num_sample_classes=2), dict(power=0.0, count='instance')),
    )
    state_names = ('sampling_weight',)

    def __init__(
        self,
        num_sample_classes: int = 50,
        power: float = 0.5,
        count: str = 'image',
        prior_prob: float | None = 0.01,
        **kwargs: Any,
    ) -> None:
        if num_sample_classes != int(num_sample_classes) or num_sample_classes < 1:
            raise InputError(
                '`loss_cls.num_sample_classes` of FederatedLoss must be a whole number of at least '
                f'1, found {num_sample_classes}.'
            )
        if power < 0:
            raise InputError(
                f'`loss_cls.power` of FederatedLoss must be at least 0, found {power}.'
            )
        self.num_sample_classes, self.power = int(num_sample_classes), power
        self.count = check_count('FederatedLoss', count)
        super().__init__(prior_prob=prior_prob, **kwargs)

    def size_buffers(self, num_classes: int) -> None:
        self.declare_static(sampling_weight=num_classes)

    def take_statistics(self, stats: ClassStatistics) -> None:
        self.fill_static(sampling_weight=class_count(stats, self.count) ** self.power)

    def terms(self, rows: Rows) -> SigmoidTerms:
        classes = federated_classes(
            present_classes(rows), self.sampling_weight, self.num_sample_classes
        )
        return SigmoidTerms(self.ones(rows), classes.to(self.sampling_weight.dtype))
