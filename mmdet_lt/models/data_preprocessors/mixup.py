r"""Mixup of detection batches: pixels or features are blended, the boxes of both images are kept.

Papers: Zhang et al., *mixup: Beyond Empirical Risk Minimization*, ICLR 2018,
https://arxiv.org/abs/1710.09412; Verma et al., *Manifold Mixup*, ICML 2019,
https://arxiv.org/abs/1806.05236; Zhang et al., *Bag of Freebies for Training Object Detection
Neural Networks*, https://arxiv.org/abs/1902.04103 (weights of boxes).

.. math::
    \tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \qquad \lambda \sim Beta(\alpha, \alpha)

Image ``i`` gets its own boxes with weight ``λ`` and those of image ``π(i)`` with weight ``1 - λ``,
in the field ``gt_instances.loss_weights``. ``π`` is a single cycle, so no image is its own partner
and each image is a partner once: the weights of a batch sum to its number of boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_lt.errors import InputError


@dataclass(frozen=True)
class Mix:
    """What one batch does: ``lam`` in [0, 1] and the partner ``π(i)`` of each image."""

    lam: float
    partner: tuple[int, ...]

    @property
    def is_identity(self) -> bool:
        """Whether blending changes nothing."""
        return self.lam == 1


def draw_mix(rng: np.random.Generator, alpha: float, batch_size: int) -> Mix:
    """Draw ``λ ~ Beta(alpha, alpha)`` and a cycle through the batch.

    A batch of one image, the last of an epoch, has no partner and gets ``λ = 1``.
    """
    if batch_size < 2:
        return Mix(1.0, tuple(range(batch_size)))
    order = rng.permutation(batch_size)
    partner = np.empty(batch_size, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return Mix(float(rng.beta(alpha, alpha)), tuple(partner.tolist()))


def blend(x: Tensor | tuple | list, mix: Mix) -> Tensor | tuple | list:
    """``λ x_i + (1 - λ) x_{π(i)}`` of (B, ...) tensors, or of each tensor in a tuple or list."""
    if mix.is_identity:
        return x
    if isinstance(x, (tuple, list)):
        return type(x)(blend(level, mix) for level in x)
    # Stacking views needs no index tensor, which would have to be copied to the device.
    partner = torch.stack([x[index] for index in mix.partner])
    return mix.lam * x + (1 - mix.lam) * partner


def mix_samples(samples: list[DetDataSample], mix: Mix) -> None:
    """Give every sample the boxes, masks, ignored regions and extent of both images, in place.

    Boxes of weight exactly 0 are left out, so ``λ = 1`` is training without mixup. Images are
    aligned at the top left corner; the mixed image reaches as far as the larger one in each
    direction. Verified-absent classes are those absent from both images, not exhaustively
    annotated ones those of either.

    Raises:
        InputError: Samples with semantic maps or precomputed proposals, which cannot be mixed.
    """
    for field in ('gt_sem_seg', 'proposals'):
        if field in samples[0]:
            raise InputError(
                f'mixup cannot mix `{field}` of the data samples: remove it from '
                '`train_dataloader.dataset.pipeline` or remove MixupHook from `custom_hooks`.'
            )
    mixed = [_pair(samples[i], samples[j], mix.lam) for i, j in enumerate(mix.partner)]
    for sample, (instances, ignored, meta) in zip(samples, mixed, strict=True):
        sample.gt_instances = instances
        if ignored is not None:
            sample.ignored_instances = ignored
        sample.set_metainfo(meta)


def _pair(
    own: DetDataSample, other: DetDataSample, lam: float
) -> tuple[InstanceData, InstanceData | None, dict]:
    weighted = [(s, w) for s, w in ((own, lam), (other, 1 - lam)) if w > 0]
    kept = [sample for sample, _ in weighted]
    parts = []
    for sample, weight in weighted:
        part = _padded(sample.gt_instances, sample)
        part.loss_weights = torch.full((len(part),), weight, device=part.bboxes.device)
        parts.append(part)
    ignored = None
    if 'ignored_instances' in own:
        ignored = InstanceData.cat([_padded(s.ignored_instances, s) for s in kept])
    return InstanceData.cat(parts), ignored, _joint_meta(kept)


def _padded(instances: InstanceData, sample: DetDataSample) -> InstanceData:
    """A shallow copy whose masks have the size of the batch, since only equal sizes are joined."""
    copy = instances.new()
    size = tuple(sample.metainfo.get('batch_input_shape', sample.img_shape))
    if 'masks' in copy and (copy.masks.height, copy.masks.width) != size:
        copy.masks = copy.masks.pad(size, pad_val=0)
    return copy


def _joint_meta(samples: list[DetDataSample]) -> dict:
    meta = {}
    for key in ('img_shape', 'pad_shape'):
        if key in samples[0]:
            sizes = [sample.metainfo[key] for sample in samples]
            meta[key] = tuple(max(extent) for extent in zip(*sizes, strict=True))
    for key, join in (
        ('neg_category_ids', set.intersection),
        ('not_exhaustive_category_ids', set.union),
    ):
        if key in samples[0]:
            meta[key] = sorted(join(*(set(sample.metainfo[key]) for sample in samples)))
    return meta
