r"""LOCE: the equilibrium loss (EBL), a softmax whose margins follow the scores of the classes.

Paper: Feng et al., *Exploring Classification Equilibrium in Long-Tailed Object Detection*, ICCV
2021, https://arxiv.org/abs/2108.07507. Authors' code: https://github.com/fcjian/LOCE.

.. math::
    L = \frac{1}{A} \sum_i w_i\,\mathrm{CE}(z_i + \log s, y_i), \qquad
    s_c \leftarrow \alpha s_c + (1 - \alpha)\, \overline{\mathrm{softmax}(z_i)_c}\Big|_{y_i = c},
    \qquad s_{bg} = 0.01

where ``s_c`` is the mean score that the class reaches on its own rows: a class that scores low is
easily suppressed, and so costs its competitors less. ``w_i`` is ``weight``, ``A`` is
``avg_factor``. ``s`` is updated before the loss and carries no gradient. Scores at test are
``softmax(z)``.

Differs from the authors' code: there every ground truth of a class gives one score, the mean over
its positive rows, and the ``k`` scores of an iteration count as ``α^k``. A loss knows rows, not
ground truths: here all positive rows of one class of one optimiser step, over all calls and
ranks, give one mean, which counts as ``α``. The log form stays finite where the authors' takes the
log of an underflown probability; ``s`` is a buffer and survives a resume; rows of weight 0 count
for nothing. The second half of the paper, memory-augmented feature sampling, adds rows to the head
and is no part of a loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.running import RunningStatistics
from mmdet_lt.models.losses.softmax_loss import SoftmaxLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.softmax import softmax_loss
from mmdet_lt.registry import MODELS


def equilibrium_loss(z: Tensor, label: Tensor, mean_score: Tensor) -> Tensor:
    """Loss of each row, (N,).

    Args:
        z: Logits, (N, K), any floating dtype.
        label: Column of each row, (N,) int64; outside ``[0, K)`` the row's loss is 0.
        mean_score: ``s``, (K,), background last.
    """
    return softmax_loss(z, label, log_score(mean_score))


def log_score(mean_score: Tensor) -> Tensor:
    """``log s``; a score that has underflown to 0 counts as the smallest normal number."""
    return mean_score.clamp_min(torch.finfo(mean_score.dtype).tiny).log()


@torch.no_grad()
def score_sums(
    z: Tensor, label: Tensor, num_classes: int, row_weight: Tensor | None = None
) -> Tensor:
    """Sum of the scores at the label and number of rows, for each class, float32 (2, C).

    Args:
        z: Logits, (N, K).
        label: Class of each row, (N,) int64 in ``[0, C]``.
        num_classes: C.
        row_weight: (N,); rows of weight 0 do not count.
    """
    score = torch.exp(-softmax_loss(z, label)).float()
    counts = torch.ones_like(score)
    if row_weight is not None:
        counts = (row_weight != 0).float()
        score = score.masked_fill(row_weight == 0, 0)
    sums = score.new_zeros(2, num_classes + 1)
    return sums.index_add_(1, label, torch.stack([score, counts]))[:, :num_classes]


def updated_score(mean_score: Tensor, sums: Tensor, alpha: float) -> Tensor:
    """``s`` after one step; classes without a row, and background, keep theirs.

    Args:
        mean_score: ``s``, (C + 1,).
        sums: Those of :func:`score_sums`, over all calls of the step, (2, C).
        alpha: Weight α of the old score.
    """
    total, rows = sums
    old = mean_score[:-1]
    new = alpha * old + (1 - alpha) * total / rows.clamp_min(1)
    return torch.cat([torch.where(rows > 0, new, old), mean_score[-1:]])


@MODELS.register_module()
class LOCELoss(RunningStatistics, SoftmaxLoss):
    """Equilibrium loss of LOCE, see the formula above.

    Args:
        alpha: Weight α of the old score in an update, in [0, 1).
        init_score: ``s`` of the classes before anything was seen, in (0, 1].
        bg_score: ``s`` of background, constant, in (0, 1].
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffer, float32 (C + 1,), saved in checkpoints: ``mean_score``, background last.

    Shapes: logits (N, C + 1) with background last, or (N, C).
    """

    tags = LossTags(
        title='LOCE',
        paper='ICCV 2021',
        url='https://arxiv.org/abs/2108.07507',
        running=True,
        variants=(dict(alpha=0.0), dict(init_score=0.5, bg_score=0.1)),
    )
    state_names = ('mean_score',)
    state_extra = 1

    def __init__(
        self,
        alpha: float = 0.9,
        init_score: float = 0.01,
        bg_score: float = 0.01,
        **kwargs: Any,
    ) -> None:
        if not 0 <= alpha < 1:
            raise InputError(f'`loss_cls.alpha` of LOCELoss must lie in [0, 1), found {alpha}.')
        for key, value in dict(init_score=init_score, bg_score=bg_score).items():
            if not 0 < value <= 1:
                raise InputError(f'`loss_cls.{key}` of LOCELoss must lie in (0, 1], found {value}.')
        self.alpha, self.init_score, self.bg_score = alpha, init_score, bg_score
        super().__init__(**kwargs)
        self.init_running()

    def size_buffers(self, num_classes: int) -> None:
        score = torch.full((num_classes + 1,), self.init_score)
        score[-1] = self.bg_score
        self.register_buffer('mean_score', score)

    def increment_like(self) -> Tensor:
        return self.mean_score.new_zeros(2, self.num_classes)

    def apply_increment(self, increment: Tensor) -> None:
        self.mean_score = updated_score(self.mean_score, increment, self.alpha)

    def reset_running(self) -> None:
        device = self.mean_score.device
        self.size_buffers(self.num_classes)
        self.to(device)

    def adjustment(self, rows: Rows) -> Tensor:
        if rows.count:
            self.add_increment(
                score_sums(rows.z.detach(), rows.label, self.num_classes, rows.row_weight)
            )
        score = self.mean_score
        # Increments that wait for the optimiser step count already, as they would without a hook.
        if self.pending.dim() == 2:
            finite = torch.isfinite(self.pending).all()
            score = torch.where(finite, updated_score(score, self.pending, self.alpha), score)
        return log_score(score)[: rows.z.shape[1]]
