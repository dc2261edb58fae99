"""What stands around a head and looks at its scores or losses: matchers, samplers, detectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmdet.models.roi_heads import PISARoIHead
from mmdet.models.task_modules.assigners.match_cost import ClassificationCost, FocalLossCost
from mmdet.models.task_modules.samplers import OHEMSampler, ScoreHLRSampler
from mmdet.registry import MODELS
from torch import nn

from mmdet_lt.engine.hooks._config_keys import config_key
from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.task_modules.samplers.ohem_sampler import OHEMSampler as OurOHEMSampler

#: Names under which heads may hold a loss of this package.
_PLACES = ('loss_cls', 'loss_enc', 'initial_loss_cls')


def check_places(model: nn.Module) -> None:
    """Our losses belong in ``loss_cls``, the only place this package knows what to do in.

    Raises:
        InputError: One is somewhere else, such as in ``loss_obj`` or ``loss_mask``.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LongTailLoss):
            continue
        parts = name.split('.')
        place = next((part for part in parts if part in _PLACES), None)
        if place is None:
            raise InputError(
                f'`{config_key(name)}` is a {module.name}, a loss of classes: write it in '
                '`loss_cls` of a detection head, and a loss of MMDetection here.'
            )
        owner = model.get_submodule('.'.join(parts[: parts.index(place)]))
        if place == 'initial_loss_cls' and not getattr(owner, 'follows_loss', False):
            raise InputError(
                f'{type(owner).__name__} hands the {module.name} in `{config_key(name)}` '
                'probabilities, not logits: set '
                f"`{config_key(name.rpartition('.')[0])}.type='mmdet_lt.LTTOODHead'`."
            )


def check_predictor(name: str, head: nn.Module) -> None:
    """A head must have the classifier that its config names.

    Raises:
        InputError: The head builds a plain linear layer whatever ``cls_predictor_cfg`` says, as
            those of Double-Head and SABL do.
    """
    kind = (getattr(head, 'cls_predictor_cfg', None) or {}).get('type', 'Linear')
    wanted = MODELS.get(kind) if isinstance(kind, str) else kind
    built = getattr(head, 'fc_cls', None)
    if built is None or wanted is None or isinstance(built, wanted):
        return
    stock = type(head).__name__
    raise InputError(
        f'{stock} ignores `{config_key(name)}.cls_predictor_cfg.type={kind!r}`, its classifier is '
        f"a {type(built).__name__}: set `{config_key(name)}.type='mmdet_lt.LT{stock}'`."
    )


def wrong_matching(model: nn.Module, name: str, head: nn.Module) -> tuple[str, str]:
    """What is wrong with the class cost of the matcher of a stock head, and what to write instead.

    The second is '' where a head of this package converts the scores; both are if all is well.
    """
    costs = [cost for item in _matchers(model, name, head) for cost in item]
    if head.loss_cls.sigmoid and any(isinstance(cost, ClassificationCost) for cost in costs):
        return (
            'its matcher takes a softmax',
            'write `FocalLossCost` in place of `ClassificationCost` in `match_costs` of its '
            '`train_cfg`',
        )
    if not head.loss_cls.sigmoid and any(costs_sigmoids(cost) for cost in costs):
        return 'its matcher (`FocalLossCost`) takes sigmoids', ''
    return '', ''


def costs_sigmoids(cost: Any) -> bool:
    """Whether a cost of a matcher takes sigmoids of the classes, not of masks."""
    return isinstance(cost, FocalLossCost) and not cost.binary_input


def _matchers(model: nn.Module, name: str, head: nn.Module) -> Iterator[Any]:
    assigners = [getattr(head, 'assigner', None)]
    owner = _roi_head(model, name)
    if owner is not None:
        found = getattr(owner, 'bbox_assigner', None)
        assigners += found if isinstance(found, list) else [found]
    for assigner in assigners:
        yield getattr(assigner, 'match_costs', ())


def check_roi_surroundings(model: nn.Module, name: str, head: nn.Module, plain: bool) -> None:
    """Refuse samplers, RoI heads and detectors that compute scores or losses by rules of their own.

    Args:
        model: The detector.
        name: Name of the box head in it.
        head: The box head.
        plain: Whether the scores of the loss are the sigmoid, or the softmax, of the logits.

    Raises:
        InputError: With what to use instead.
    """
    loss, owner = head.loss_cls, _roi_head(model, name)
    if owner is None:
        return
    key = config_key(name.partition('.bbox_head')[0])
    by_softmax = plain and not loss.sigmoid
    for sampler in _samplers(owner):
        ohem = isinstance(sampler, OHEMSampler) and not isinstance(sampler, OurOHEMSampler)
        ranks = isinstance(sampler, ScoreHLRSampler)
        if (ohem and loss.sigmoid) or (ranks and not by_softmax):
            why = 'ranks by a softmax of the logits' if ranks else 'wants one loss for each row'
            raise InputError(
                f'{type(sampler).__name__} {why}, which {loss.name} (`{key}.bbox_head.loss_cls`) '
                "does not have: set `train_cfg.rcnn.sampler.type='mmdet_lt.OHEMSampler'`"
                + (f" and `{key}.type='StandardRoIHead'`." if ranks else '.')
            )
    settings = getattr(owner, 'train_cfg', None) if isinstance(owner, PISARoIHead) else None
    carl = (settings or {}).get('carl')
    if carl is not None and not (plain and bool(carl.get('sigmoid', False)) == loss.sigmoid):
        raise InputError(
            f'PISARoIHead weights boxes (`train_cfg.rcnn.carl`) by scores that are not those of '
            f"{loss.name}: set `{key}.type='StandardRoIHead'` and `train_cfg.rcnn.sampler.type="
            "'mmdet_lt.OHEMSampler'`."
        )
    _check_soft_teacher(model, key, loss)


def _samplers(owner: nn.Module) -> Iterator[Any]:
    found = getattr(owner, 'bbox_sampler', None)
    for sampler in found if isinstance(found, list) else [found]:
        yield from (sampler, getattr(sampler, 'pos_sampler', None))
        yield getattr(sampler, 'neg_sampler', None)


def _check_soft_teacher(model: nn.Module, key: str, loss: LongTailLoss) -> None:
    soft = 'SoftTeacher' in {cls.__name__ for cls in type(model).__mro__}
    if soft and loss.sigmoid and not loss.extra_columns:
        raise InputError(
            f'SoftTeacher weights background by its score, {loss.name} (`{key}.bbox_head.loss_cls`)'
            ' gives background none: use a softmax loss, or EQLv2Loss, whose objectness scores it.'
        )


def _roi_head(model: nn.Module, name: str) -> nn.Module | None:
    """The RoI head that owns a box head, None for heads of other detectors."""
    parts = name.split('.')
    if 'bbox_head' not in parts or 'roi_head' not in parts:
        return None
    return model.get_submodule('.'.join(parts[: parts.index('bbox_head')]))
