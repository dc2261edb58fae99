"""Training with a loss weight for each ground-truth box, for heads that know no such thing.

A box with weight ``w`` (``gt_instances.loss_weights``, (G,) float) multiplies the classification,
box, centre and mask loss of all samples assigned to it by ``w``. Background samples keep weight 1:
they are background for both images of a mixup, ``λ + (1 - λ) = 1``. Where a head divides by its
number of *positive* samples it divides by the sum of their weights; divisors that count all
samples (RPN, RoI heads) stay.

:func:`enable_box_weights` gives the heads of a detector a sub-class with the mixin of their family.
Without the field they compute what they computed before, and with all weights 1 too. A mixin relies
on certain methods of its family; a head that replaces one of those is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.losses import CrossEntropyLoss
from mmdet.models.losses import EQLV2Loss as UnweightedEQLv2
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.task_modules._box_weight_mixins import (
    FIELD,
    BoxWeightsAnchor,
    BoxWeightsATSS,
    BoxWeightsFCOS,
    BoxWeightsMask,
    BoxWeightsRoI,
)

__all__ = ['FIELD', 'disable_box_weights', 'enable_box_weights', 'set_box_weights']

_MIXINS = (BoxWeightsRoI, BoxWeightsMask, BoxWeightsATSS, BoxWeightsFCOS, BoxWeightsAnchor)
_KNOWN = (
    'RPNHead, RetinaHead, ATSSHead and FCOSHead; StandardRoIHead and CascadeRoIHead with BBoxHead, '
    'Shared2FCBBoxHead or ConvFCBBoxHead and FCNMaskHead'
)


def enable_box_weights(model: nn.Module) -> list[nn.Module]:
    """Make every head of a detector honour ``gt_instances.loss_weights``.

    Heads keep their parameters, names and configs; only their Python class changes to a sub-class.

    Args:
        model: Detector, not wrapped.

    Returns:
        The changed heads, for :func:`disable_box_weights`.

    Raises:
        InputError: The detector or one of its heads or losses cannot honour the weights.
    """
    heads = dict(_heads(model))
    classes = {name: _weighted_class(name, head) for name, head in heads.items()}
    for name, head in heads.items():
        head.__class__ = classes[name]
    return list(heads.values())


def disable_box_weights(heads: list[nn.Module]) -> None:
    """Give the heads their own class back."""
    for head in heads:
        head.__class__ = type(head).__mro__[2]


def set_box_weights(heads: list[nn.Module], weights: list[Tensor] | None) -> None:
    """Tell the RoI heads the weights of the boxes of each image of the batch."""
    for head in heads:
        if isinstance(head, BoxWeightsRoI):
            head.box_weights = weights


def _heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    _require_methods('the detector', model, (SingleStageDetector, TwoStageDetector), ('loss',))
    for name in ('rpn_head', 'bbox_head'):
        if getattr(model, name, None) is not None:
            yield name, getattr(model, name)
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is None:
        return
    methods = ('loss', 'bbox_loss', 'mask_loss')
    _require_methods('`model.roi_head`', roi_head, (StandardRoIHead, CascadeRoIHead), methods)
    for name in ('bbox_head', 'mask_head'):
        head = getattr(roi_head, name, None)
        stages = head if isinstance(head, nn.ModuleList) else [head]
        for number, stage in enumerate(stages):
            if stage is not None:
                suffix = f'.{number}' if isinstance(head, nn.ModuleList) else ''
                yield f'roi_head.{name}{suffix}', stage


def _weighted_class(name: str, head: nn.Module) -> type:
    cls = type(head)
    for mixin in _MIXINS:
        if isinstance(head, mixin.families):
            break
    else:
        raise InputError(_refusal(f'`model.{name}`', cls.__name__))
    _require_methods(f'`model.{name}`', head, mixin.families, mixin.relies_on)
    if isinstance(getattr(head, 'loss_cls', None), UnweightedEQLv2):
        raise InputError(
            f"mixup needs a loss that honours weights, found mmdet's EQLV2Loss in "
            f"`model.{name}.loss_cls`, which ignores them: use type='mmdet_lt.EQLv2Loss'."
        )
    if mixin is BoxWeightsMask:
        _check_mask_loss(name, head.loss_mask)
    return type(f'BoxWeights{cls.__name__}', (mixin, cls), {})


def _check_mask_loss(name: str, loss: nn.Module) -> None:
    if type(loss) is not CrossEntropyLoss or not loss.use_mask or loss.class_weight is not None:
        raise InputError(
            f"mixup needs `model.{name}.loss_mask=dict(type='CrossEntropyLoss', use_mask=True)` "
            f'without `class_weight`, found {type(loss).__name__}.'
        )


def _require_methods(
    where: str, module: nn.Module, families: tuple[type, ...], methods: tuple[str, ...]
) -> None:
    """Raise InputError unless the methods are still those of one of the families."""
    for family in families:
        if isinstance(module, family) and all(
            getattr(type(module), name) is getattr(family, name) for name in methods
        ):
            return
    raise InputError(_refusal(where, type(module).__name__))


def _refusal(where: str, found: str) -> str:
    return (
        f'mixup cannot weight the loss of single boxes in {where}, a {found}: use {_KNOWN}, or '
        'remove MixupHook from `custom_hooks`.'
    )
