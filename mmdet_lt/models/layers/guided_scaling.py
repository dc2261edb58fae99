r"""Guided loss scaling: the localisation loss says how large the classification loss may be.

Paper: Chen et al., *Is Sampling Heuristics Necessary in Training Deep Object Detectors?*,
https://arxiv.org/abs/1909.04868.

.. math::
    L = L_{loc} + f\, r\, L_{cls}, \qquad r = \mathrm{sg}(L_{loc} / L_{cls})

``sg`` stops the gradient and ``f`` is 2 for RoI heads, else 1. Any divisor of the classification
loss cancels, so no row has to be sampled, weighted or counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.running import all_reduce_sum

Losses = Mapping[str, Tensor | list[Tensor]]

_OTHER = re.compile(r'mask|seg')
_CLS = re.compile(r'^loss_(rpn_)?cls')
_BOX = re.compile(r'bbox|dfl|loss_reg|loss_xy|loss_wh|loss_pts')
_QUALITY = re.compile(r'centerness|iou')
_STAGE = re.compile(r'^s\d+$')


def loss_role(key: str) -> str:
    """'cls', 'box', 'quality' (centre-ness, predicted IoU) or 'other' for a key of the losses."""
    name = key.rpartition('.')[2].removeprefix('rpn_')
    if 'loss' not in name or _OTHER.search(name):
        return 'other'
    for role, pattern in (('cls', _CLS), ('box', _BOX), ('quality', _QUALITY)):
        if pattern.search(name):
            return role
    return 'other'


def loss_value(loss: Tensor | Sequence[Tensor]) -> Tensor:
    """What a loss adds to the total: its mean, summed over pyramid levels; float32, 0-d."""
    parts = [loss] if isinstance(loss, Tensor) else loss
    return sum(part.float().mean() for part in parts)


def check_localisation(detector: nn.Module, heads: Mapping[str, nn.Module]) -> None:
    """Refuse a detector in which nothing can guide the classification loss of a head.

    Args:
        detector: The detector.
        heads: Name to module of its classification heads.

    Raises:
        InputError: A head has no localisation loss, or one of weight 0.
    """
    for name, head in heads.items():
        losses = {
            key: loss
            for key, loss in head.named_children()
            if key.startswith('loss_') and loss_role(key) == 'box'
        }
        working = [k for k, loss in losses.items() if getattr(loss, 'loss_weight', 1) != 0]
        if not working or not getattr(head, 'with_reg', True):
            raise InputError(
                f'guided loss scaling needs a localisation loss in `model.{name}` '
                f'({type(head).__name__} of {type(detector).__name__}), found '
                f'{[*losses] or "none"} of which none works: use a detector that localises, give '
                'the loss a `loss_weight` above 0, or set `model.sampling_free.guided=False`.'
            )


class GuidedLossScaling(nn.Module):
    r"""Scale the classification losses of a detector to its localisation losses.

    A *group* is one classifier with its localisation losses: ``rpn``, ``dense`` (a one-stage head),
    ``roi``, or the stages ``s0``, ``s1``, ... of a cascade. Its ratio is

    .. math::
        r_t = \mathrm{clamp}(\bar L_{loc} / \bar L_{cls}), \qquad
        \bar L \leftarrow m \bar L + (1 - m) \sum_{ranks} L

    With ``momentum`` 0 it is the ratio of the iteration. A group without positive rows on any rank
    (localisation loss 0) keeps its last ratio, 1 at first. One collective an iteration, in which
    every rank takes part whatever its batch holds.

    Args:
        groups: Names of the groups; keys that name no group belong to the last one.
        quality_groups: Groups with a centre-ness or IoU branch.
        momentum: ``m`` in [0, 1).
        clamp: Bounds of the ratio, or None.
        freeze_after: Iterations after which ratios stay as they are; None for never. One that had
            no batch with objects until then is set by the first such batch.
        roi_factor: ``f`` of RoI heads.
        guide_by: 'box': by the sum of the box losses; 'mean': by the mean of all other losses of
            the group, quality ones too.
        uncertainty: Weight every loss of a group by a learned uncertainty,
            ``L / (2 σ²) + log σ``. The parameter is ``log_sigma``, 0 at the start (``σ = 1``, each
            loss is halved), which keeps ``σ`` positive. It needs weight decay 0.
        check_finite: Stop at the first loss that is NaN or infinite, before any state learns from
            it; all ranks stop together. Costs one synchronisation an iteration. Without it such an
            iteration leaves the ratios alone.

    Buffers: ``ratio``, ``cls_mean``, ``loc_mean`` float32 (groups,), ``steps`` int64 (); saved in
    checkpoints.
    """

    def __init__(
        self,
        groups: Sequence[str],
        quality_groups: Sequence[str] = (),
        momentum: float = 0.9,
        clamp: tuple[float, float] | None = (1e-3, 1e3),
        freeze_after: int | None = None,
        roi_factor: float = 2.0,
        guide_by: str = 'box',
        uncertainty: bool = False,
        check_finite: bool = True,
    ) -> None:
        super().__init__()
        self.groups = tuple(groups)
        self.momentum, self.clamp, self.freeze_after = momentum, clamp, freeze_after
        self.guide_by, self.check_finite = guide_by, check_finite
        factors = [roi_factor if g == 'roi' or _STAGE.match(g) else 1.0 for g in self.groups]
        self.register_buffer('factor', torch.tensor(factors), persistent=False)
        self.register_buffer('ratio', torch.ones(len(self.groups)))
        self.register_buffer('cls_mean', torch.zeros(len(self.groups)))
        self.register_buffer('loc_mean', torch.zeros(len(self.groups)))
        self.register_buffer('steps', torch.zeros((), dtype=torch.int64))
        self.terms = [
            (group, role)
            for group in self.groups
            for role in ('cls', 'box', 'quality')
            if role != 'quality' or group in quality_groups
        ]
        self.log_sigma = nn.Parameter(torch.zeros(len(self.terms))) if uncertainty else None

    def group_of(self, key: str) -> str:
        """The group a key of the losses belongs to."""
        stage = key.partition('.')[0]
        if stage in self.groups:
            return stage
        if 'rpn' in key and 'rpn' in self.groups:
            return 'rpn'
        return self.groups[-1]

    def forward(self, losses: Losses) -> dict[str, Tensor | list[Tensor]]:
        """Scaled losses, with the ratios as ``guide_<group>`` and perhaps ``loss_uncertainty``.

        State changes in training mode with gradients only.

        Args:
            losses: What the detector returned: tensors, or lists with one tensor a level.

        Raises:
            InputError: A classification loss without localisation loss, or (``check_finite``) a
                loss that is not finite.
        """
        sorted_keys = self._sort(losses)
        cls, loc = self._values(losses, sorted_keys)
        if self.training and torch.is_grad_enabled():
            self._learn(losses, cls.detach(), loc.detach())
        return self._scaled(losses)

    def _sort(self, losses: Losses) -> dict[str, dict[str, list[str]]]:
        """Keys of each group by role."""
        keys = {g: {'cls': [], 'box': [], 'quality': [], 'other': []} for g in self.groups}
        for key in losses:
            keys[self.group_of(key)][loss_role(key)].append(key)
        # An RoI head without any row reports no classification loss.
        missing = [g for g in self.groups if g in ('rpn', 'dense') and not keys[g]['cls']]
        missing += [g for g in self.groups if keys[g]['cls'] and not keys[g]['box']]
        if missing:
            found = [key for key in losses if 'loss' in key]
            raise InputError(
                'guided loss scaling needs a classification loss and a localisation loss of '
                f'{missing[0]!r}, found the losses {found}: use a detector that has both, or set '
                '`model.sampling_free.guided=False`.'
            )
        return keys

    def _values(
        self, losses: Losses, keys: dict[str, dict[str, list[str]]]
    ) -> tuple[Tensor, Tensor]:
        """Classification and guiding loss of each group, (groups,) each."""
        rows = []
        for group in self.groups:
            of = keys[group]
            guides = of['box'] + (of['quality'] if self.guide_by == 'mean' else [])
            divisor = len(guides) if self.guide_by == 'mean' and guides else 1
            cls = sum((loss_value(losses[k]) for k in of['cls']), self.ratio.new_zeros(()))
            loc = sum((loss_value(losses[k]) for k in guides), self.ratio.new_zeros(()))
            rows.append(torch.stack([cls, loc / divisor]))
        cls, loc = torch.stack(rows).unbind(1)
        return cls, loc

    def _learn(self, losses: Losses, cls: Tensor, loc: Tensor) -> None:
        """Update the ratios from the losses of all ranks."""
        values = torch.stack([loss_value(v) for k, v in losses.items() if 'loss' in k])
        bad = (~torch.isfinite(values.detach())).any().float()
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        reduced = all_reduce_sum(torch.cat([cls, loc, bad[None]])) / world
        cls, loc = reduced[:-1].split(len(self.groups))
        if self.check_finite and bool(reduced[-1] > 0):
            raise InputError(self._not_finite(losses))
        valid = (reduced[-1] == 0) & (cls > 0) & (loc > 0)
        if self.freeze_after is not None:
            # A ratio that was never learned, for want of objects, is nothing to keep.
            valid = valid & ((self.steps < self.freeze_after) | (self.cls_mean == 0))
        # A first value has nothing to be averaged with.
        momentum = torch.where(self.cls_mean > 0, self.momentum, 0.0)
        cls = torch.where(valid, momentum * self.cls_mean + (1 - momentum) * cls, self.cls_mean)
        loc = torch.where(valid, momentum * self.loc_mean + (1 - momentum) * loc, self.loc_mean)
        ratio = loc / torch.where(valid, cls, torch.ones_like(cls))
        if self.clamp is not None:
            ratio = ratio.clamp(*self.clamp)
        self.cls_mean, self.loc_mean = cls, loc
        self.ratio = torch.where(valid, ratio, self.ratio)
        self.steps = self.steps + 1

    def _not_finite(self, losses: Losses) -> str:
        values = {key: loss_value(v).item() for key, v in losses.items() if 'loss' in key}
        names = [f'`{key}` is {v:g}' for key, v in values.items() if not math.isfinite(v)]
        return (
            f'every loss must be finite, but {", ".join(names) or "one of another rank is not"} in '
            f'iteration {int(self.steps) + 1} of guided loss scaling; ratios and weights are those '
            'before it: lower `optim_wrapper.optimizer.lr`, set `optim_wrapper.clip_grad` or '
            'resume from the last checkpoint.'
        )

    def _scaled(self, losses: Losses) -> dict[str, Tensor | list[Tensor]]:
        scale = dict(zip(self.groups, self.ratio * self.factor, strict=True))
        weight = {}
        if self.log_sigma is not None:
            halves = 0.5 * torch.exp(-2 * self.log_sigma)
            weight = dict(zip(self.terms, halves, strict=True))
        scaled: dict[str, Tensor | list[Tensor]] = {}
        for key, loss in losses.items():
            group, role = self.group_of(key), loss_role(key)
            factor = weight.get((group, role))
            if role == 'cls':
                factor = scale[group] if factor is None else factor * scale[group]
            if factor is None:
                scaled[key] = loss
            elif isinstance(loss, Tensor):
                scaled[key] = loss * factor
            else:
                scaled[key] = [part * factor for part in loss]
        # No 'loss' in the names: MMEngine adds everything with it to the total.
        scaled.update({f'guide_{g}': r for g, r in zip(self.groups, self.ratio, strict=True)})
        if self.log_sigma is not None:
            scaled['loss_uncertainty'] = self.log_sigma.sum()
        return scaled
