r"""Gradient harmonizing loss for classification (GHM-C).

Paper: Li et al., *Gradient Harmonized Single-stage Detector*, AAAI 2019,
https://arxiv.org/abs/1811.05181. Authors' code: https://github.com/libuyu/GHM_Detection.

.. math::
    L = \frac{1}{V} \sum_{ij} s_{ij}\, \beta_{b(ij)}\, \mathrm{BCE}(z_{ij}, t_{ij}), \qquad
    \beta_b = \frac{1}{n\, r_b}, \quad g = |\sigma(z) - t|

``b(ij)`` is the bin of ``g`` among ``bins`` equal ones on [0, 1], ``V`` the number of valid
entries (``weight`` above 0), ``n`` the number of bins that hold one, and ``r_b`` the share of the
valid entries in bin b. With ``momentum`` m the share is that of

.. math::
    r = \frac{m\, S + (1 - m)\, r_{call}}{m\, N + 1 - m}, \qquad
    S \leftarrow m\, S + (1 - m)\, r_{step}, \quad N \leftarrow m\, N + 1 - m

where ``r_step`` is the share over all calls and ranks of one optimiser step.

Differs from MMDetection's ``GHMC``, which it equals at ``momentum=0``: averages are free of the
bias of their start at zero, which there multiplies the first weights by ``1 / (1 - m)``; bins
nobody visits fade; shares, not counts, are averaged, so that neither the size of a pyramid level
nor the number of ranks matters; ``weight`` is a factor, not only a mask; no synchronisation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.element_loss import ElementLoss
from mmdet_lt.models.losses.rows import Rows
from mmdet_lt.models.losses.running import RunningStatistics
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.ops.element import Element, element_blocks
from mmdet_lt.registry import MODELS


def gradient_bin(z: Tensor, target: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """``(g, its bin)``, the bin int64; ``edges`` are the inner ones in ascending order."""
    g = (torch.sigmoid(z) - target).abs()
    return g, torch.bucketize(g, edges.to(z.dtype), right=True)


def bin_counts(
    z: Tensor,
    label: Tensor,
    edges: Tensor,
    weight: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Valid entries of each bin, float32 (bins,).

    Args:
        z: Logits, (N, K).
        label: Positive column of each row, (N,) int64; outside ``[0, K)``: none.
        edges: Inner edges of the bins, (bins - 1,).
        weight: (N,) or (N, K); entries of weight 0 are not counted.
        target: Soft targets, (N, K), in place of labels.
    """
    counts = torch.zeros(len(edges) + 1, device=z.device)
    for part, zb, tb in element_blocks(z.detach(), label, target):
        g, index = gradient_bin(zb, tb, edges)
        valid = torch.ones_like(g) + 0 * g  # NaN stays NaN, which running statistics refuse
        if weight is not None:
            block = weight[part]
            valid = valid.masked_fill((block if block.dim() == 2 else block[:, None]) <= 0, 0)
        # A block holds at most 2^24 entries, so its own counts are exact in float32.
        block_counts = torch.zeros_like(counts).index_add_(
            0, index.flatten(), valid.flatten().float()
        )
        counts = counts + block_counts
    return counts


def bin_weights(counts: Tensor, share: Tensor, norm: Tensor, momentum: float) -> Tensor:
    """``β`` of each bin, (bins,), 0 for bins without a valid entry in this call.

    Args:
        counts: Valid entries of this call, (bins,).
        share: ``S``, (bins,).
        norm: ``N``, 0-d.
        momentum: ``m``.
    """
    filled = counts > 0
    call = counts / counts.sum().clamp_min(1)
    mixed = (momentum * share + (1 - momentum) * call) / (momentum * norm + 1 - momentum)
    number = filled.sum().clamp_min(1)
    return torch.where(filled, 1 / (mixed * number), torch.zeros_like(mixed))


@MODELS.register_module()
class GHMCLoss(RunningStatistics, ElementLoss):
    """Gradient harmonizing loss, see the formula above.

    The divisor of a mean is the number of valid entries of the call: ``avg_factor`` has no effect.

    Args:
        bins: Number of bins; the paper's detectors use 30.
        momentum: ``m`` in [0, 1); the paper's detectors use 0.75.
        use_sigmoid: Must be True.
        loss_weight: Factor of the loss.
        reduction: 'none', 'mean' or 'sum'; only 'mean' divides.
        prior_prob: π the classifier of an RoI head starts from.
        kwargs: Arguments of :class:`LongTailLoss`.

    Buffers, float32, saved in checkpoints: ``bin_share`` (bins,), ``bin_norm`` ().

    Shapes: logits (N, C) without a background column; labels (N,), soft targets (N, C) or
    (label, quality); ``weight`` (N,) or (N, C).
    """

    tags = LossTags(
        title='Gradient harmonizing loss',
        paper='AAAI 2019',
        url='https://arxiv.org/abs/1811.05181',
        running=True,
        own_normalizer=True,
        variants=(dict(bins=30, momentum=0.75), dict(bins=1)),
    )

    def __init__(
        self,
        bins: int = 10,
        momentum: float = 0.0,
        use_sigmoid: bool | None = True,
        loss_weight: float = 1.0,
        reduction: str = 'mean',
        prior_prob: float | None = 0.01,
        **kwargs: Any,
    ) -> None:
        if bins < 1 or bins != int(bins) or not 0 <= momentum < 1:
            raise InputError(
                '`loss_cls.bins` of GHMCLoss must be a whole number of at least 1 and '
                f'`loss_cls.momentum` lie in [0, 1), found {bins} and {momentum}.'
            )
        self.bins, self.momentum = int(bins), momentum
        super().__init__(
            use_sigmoid=use_sigmoid,
            loss_weight=loss_weight,
            reduction=reduction,
            prior_prob=prior_prob,
            **kwargs,
        )
        edges = torch.arange(1, self.bins) / self.bins
        self.register_buffer('edges', edges, persistent=False)
        self.reset_running()
        self.init_running()

    def reset_running(self) -> None:
        device = self.edges.device
        self.register_buffer('bin_share', torch.zeros(self.bins, device=device))
        self.register_buffer('bin_norm', torch.zeros((), device=device))

    def increment_like(self) -> Tensor:
        return self.bin_share

    def apply_increment(self, increment: Tensor) -> None:
        total, m = increment.sum(), self.momentum
        share = increment / total.clamp_min(1)
        seen = total > 0
        self.bin_share = torch.where(seen, m * self.bin_share + (1 - m) * share, self.bin_share)
        self.bin_norm = torch.where(seen, m * self.bin_norm + (1 - m), self.bin_norm)

    def element(self, rows: Rows) -> Element:
        target = None if rows.soft is None else rows.target(distribution=False)
        counts = bin_counts(rows.z, rows.label, self.edges, rows.weight, target)
        beta = bin_weights(counts, self.bin_share, self.bin_norm, self.momentum)
        if rows.count:
            self.add_increment(counts)
        edges = self.edges

        def harmonized(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            factor = beta.to(z.dtype)[gradient_bin(z, target, edges)[1]]
            bce = F.binary_cross_entropy_with_logits(z, target, reduction='none')
            error = (1 - target) * torch.sigmoid(z) - target * torch.sigmoid(-z)
            return factor * bce, factor * error

        return harmonized

    def forward(
        self,
        cls_score: Tensor,
        target: Tensor | tuple[Tensor, Tensor],
        weight: Tensor | None = None,
        avg_factor: int | float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """As :meth:`LongTailLoss.forward`, with the valid entries as divisor of a mean."""
        if (reduction_override or self.reduction) == 'mean':
            avg_factor = cls_score.numel()
            if isinstance(weight, Tensor):
                per_row = cls_score.shape[-1] if weight.dim() == 1 else 1
                avg_factor = (weight > 0).sum() * per_row
        return super().forward(cls_score, target, weight, avg_factor, reduction_override)
