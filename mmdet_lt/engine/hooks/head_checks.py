"""Refuse a head and a loss that would train or score something else than the loss says.

A loss never learns which head owns it: at its first call it could not tell a RetinaNet from a TOOD
whose inputs are probabilities. So ``ClassStatisticsHook`` compares them before the first iteration,
on the whole model (:func:`check_class_counts` calls :func:`check_head`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead, DIIHead
from torch import nn

from mmdet_lt.engine.hooks._config_keys import config_key
from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.prior_state import classifiers
from mmdet_lt.models.losses.base import LongTailLoss


@dataclass(frozen=True)
class HeadRule:
    """What a head of MMDetection does with a loss of this package.

    Attributes:
        sigmoid: Sigmoid losses that work: 'own' any (the head asks the loss for its scores),
            'plain' those whose score is the sigmoid of the logit, 'no' none.
        softmax: The same for softmax losses.
        use: Head of this package that takes the others, '' if there is none.
        use_softmax: Whether that one takes softmax losses.
        why: What goes wrong, for the message.
    """

    sigmoid: str
    softmax: str
    use: str = ''
    use_softmax: bool = True
    why: str = 'its test scores are a fixed sigmoid or softmax of the logits'


_IGNORED = HeadRule('no', 'no', why='it ignores `loss_cls` or feeds it something else than rows')
#: By class name; a sub-class follows the nearest class above it.
RULES: dict[str, HeadRule] = {
    # dense heads that leave scores to BaseDenseHead, which asks the loss
    'RetinaHead': HeadRule('own', 'own'),
    'ATSSHead': HeadRule('own', 'own'),
    'FCOSHead': HeadRule('own', 'own'),
    'DDODHead': HeadRule('own', 'own'),
    'RetinaSepBNHead': HeadRule('own', 'own'),
    'YOLOFHead': HeadRule(
        'own', 'no', 'LTYOLOFHead', use_softmax=False, why='its logits contain an objectness'
    ),
    'VFNetHead': HeadRule(
        'own', 'no', 'LTVFNetHead', why='its classifier has no background column'
    ),
    # those with a rule of their own
    'GFLHead': HeadRule('plain', 'no', 'LTGFLHead', why='it takes the sigmoid of every logit'),
    'LDHead': HeadRule('plain', 'no', why='it takes the sigmoid of every logit'),
    'RTMDetHead': HeadRule(
        'plain', 'no', 'LTRTMDetHead', why='its assigner takes sigmoids of logits'
    ),
    'RTMDetSepBNHead': HeadRule(
        'plain', 'no', 'LTRTMDetSepBNHead', why='its assigner takes sigmoids of logits'
    ),
    'RTMDetInsHead': HeadRule('plain', 'no', why='it takes the sigmoid of every logit'),
    'PAAHead': HeadRule(
        'plain', 'no', 'LTPAAHead', why='it takes sigmoids, and one loss of each column of a row'
    ),
    'LADHead': HeadRule(
        'plain', 'no', why='it takes sigmoids, and one loss of each column of a row'
    ),
    'TOODHead': HeadRule(
        'no', 'no', 'LTTOODHead', why='it hands the loss probabilities, not logits'
    ),
    'YOLOXHead': HeadRule('no', 'no', 'LTYOLOXHead', why='it shows the loss its positives only'),
    'GuidedAnchorHead': HeadRule('plain', 'plain'),
    'SABLRetinaHead': HeadRule('plain', 'plain'),
    'RepPointsHead': HeadRule('plain', 'plain'),
    'FoveaHead': HeadRule('plain', 'no'),
    'CondInstBboxHead': HeadRule('plain', 'no'),
    'SOLOHead': HeadRule('plain', 'no'),
    'SOLOV2Head': HeadRule('plain', 'no'),
    **dict.fromkeys(
        (
            'FSAFHead',
            'FreeAnchorRetinaHead',
            'AutoAssignHead',
            'PISARetinaHead',
            'SSDHead',
            'YOLACTHead',
            'YOLOV3Head',
            'CenterNetHead',
            'CenterNetUpdateHead',
            'CornerHead',
            'GroundingDINOHead',
            'ATSSVLFusionHead',
            'MultiInstanceBBoxHead',
        ),
        _IGNORED,
    ),
    # the DETR family; see _wrong_training for encoders and denoising
    'DETRHead': HeadRule('plain', 'plain', 'LTDETRHead'),
    'ConditionalDETRHead': HeadRule('plain', 'plain', 'LTConditionalDETRHead'),
    'DABDETRHead': HeadRule('plain', 'plain', 'LTDABDETRHead'),
    'DeformableDETRHead': HeadRule('plain', 'plain', 'LTDeformableDETRHead'),
    'DINOHead': HeadRule('plain', 'no', 'LTDINOHead', use_softmax=False),
    'DDQDETRHead': HeadRule('plain', 'no', 'LTDDQDETRHead', use_softmax=False),
    'Mask2FormerHead': HeadRule('no', 'plain', 'LTMask2FormerHead', why='it is made for a softmax'),
    'MaskFormerHead': HeadRule('no', 'plain', why='it is made for a softmax'),
    # RoI heads
    'BBoxHead': HeadRule('own', 'own'),
    'DoubleConvFCBBoxHead': HeadRule('own', 'own', 'LTDoubleConvFCBBoxHead'),
    'SABLHead': HeadRule('no', 'plain', 'LTSABLHead', why='it takes the softmax of every logit'),
    'DIIHead': HeadRule('plain', 'plain', 'LTDIIHead'),
}
#: Heads of this package that work only below another one: {head: (place, what it must be)}.
_PARTNERS = {
    'LTDIIHead': ('roi_head', 'LTSparseRoIHead'),
    'LTMask2FormerHead': ('panoptic_fusion_head', 'LTMaskFormerFusionHead'),
}


def check_head(model: nn.Module, name: str, head: nn.Module, by_epoch: bool = True) -> None:
    """Compare a head with its loss; loss and head must agree on the class count.

    Args:
        model: The detector.
        name: Name of the head in it.
        head: A module with ``loss_cls``; those with losses of other packages are left alone.
        by_epoch: Whether the training loop counts epochs, for TOOD's first epochs.

    Raises:
        InputError: With the head and the loss, what goes wrong, and what to write instead.
    """
    if not isinstance(head.loss_cls, LongTailLoss):
        return
    if getattr(head, 'follows_loss', False):
        _check_partner(model, name, head)
        _check_epochs(name, head, by_epoch)
    else:
        _check_rule(name, head, head.loss_cls)


def rule_of(head: nn.Module) -> HeadRule:
    """The rule of the nearest class; heads nobody listed are judged by what they inherit."""
    for cls in type(head).__mro__:
        if cls.__name__ in RULES:
            return RULES[cls.__name__]
    if isinstance(head, BaseDenseHead):
        inherits = all(
            getattr(type(head), name) is getattr(BaseDenseHead, name)
            for name in ('predict_by_feat', '_predict_by_feat_single')
        )
        return HeadRule('own', 'own') if inherits else HeadRule('plain', 'no')
    return HeadRule('plain', 'plain')


def score_rule(loss: LongTailLoss, num_classes: int, device: torch.device | str = 'cpu') -> str:
    """'plain' if the scores in a dense head are sigmoids, or a softmax, of the logits, else 'own'.

    Found by trying: what a loss inherits says little about its scores.
    """
    columns = loss.dense_columns(num_classes)
    if columns is None:
        return 'own'
    z = torch.linspace(-5, 5, 4 * columns, device=device).reshape(columns, 4).T
    context, loss.context = loss.context, 'dense'
    try:
        scores = loss.get_activation(z)
    finally:
        loss.context = context
    wanted = z.sigmoid() if loss.sigmoid else z.softmax(1)[:, :-1]
    return 'plain' if torch.allclose(scores, wanted, atol=1e-6) else 'own'


def _check_rule(name: str, head: nn.Module, loss: LongTailLoss) -> None:
    rule, stock = rule_of(head), type(head).__name__
    of_roi = isinstance(head, BBoxHead) and not isinstance(head, DIIHead)
    if loss.dense_columns(head.num_classes) is None and not of_roi:
        raise InputError(
            f'{loss.name} in `{config_key(name)}.loss_cls` needs {loss.extra_columns} columns '
            f'beside the classes, {stock} has room for one at most: use it in an RoI head.'
        )
    allowed = rule.sigmoid if loss.sigmoid else rule.softmax
    device = next(head.parameters()).device
    key = config_key(name)
    if allowed == 'plain' and score_rule(loss, head.num_classes, device) == 'own':
        allowed = 'no'
    if allowed == 'no':
        raise InputError(_refusal(key, stock, loss, rule.why, rule))
    why = _wrong_training(head, loss)
    if why:
        raise InputError(_refusal(key, stock, loss, why, rule))
    if of_roi:
        _check_roi_width(key, head, loss, rule)
    elif loss.tags.bounded_logits and loss.prior_bias() is not None:
        set_start_bias(key, head, loss)


def _refusal(key: str, stock: str, loss: LongTailLoss, why: str, rule: HeadRule) -> str:
    kind = 'sigmoid' if loss.sigmoid else 'softmax'
    offered = rule.use and (loss.sigmoid or rule.use_softmax)
    advice = f"set `{key}.type='mmdet_lt.{rule.use}'`" if offered else 'use another head or loss'
    return f'{stock} cannot be used with {loss.name} ({kind}): {why}; {advice}.'


def _wrong_training(head: nn.Module, loss: LongTailLoss) -> str:
    """What a stock DETR head would feed the loss wrongly, '' if nothing."""
    names = {cls.__name__ for cls in type(head).__mro__}
    if 'DINOHead' in names and loss.tags.running:
        return 'its denoising queries would be counted by the running statistics'
    if 'DeformableDETRHead' in names and 'DINOHead' not in names and head.as_two_stage:
        return 'its encoder gives every object the label of class 0'
    if 'MaskFormerHead' in names and not isinstance(loss.class_weight, (list, tuple)):
        return '`loss_cls.class_weight` must be a list of C + 1 numbers'
    return ''


def _check_roi_width(key: str, head: nn.Module, loss: LongTailLoss, rule: HeadRule) -> None:
    layer = getattr(head, 'fc_cls', None)
    if not isinstance(layer, nn.Linear):  # a classifier of its own, such as a cosine one
        return
    wanted = loss.get_cls_channels(head.num_classes)
    if layer.out_features != wanted:
        why = f'its classifier has {layer.out_features} columns, the loss needs {wanted}'
        raise InputError(_refusal(key, type(head).__name__, loss, why, rule))


def set_start_bias(key: str, head: nn.Module, loss: LongTailLoss) -> None:
    """Let the classifier of a stock dense head start where a loss of bounded logits has a gradient.

    The start that ``init_cfg`` gives a classifier as ``bias_prob`` is one for a sigmoid; it is
    replaced by ``loss.prior_bias()``. A ``bias`` written in the config is kept.

    Raises:
        InputError: The head starts its classifier in code.
    """
    left = set(classifiers(head))
    entries = head.init_cfg or []
    entries = list(entries) if isinstance(entries, (list, tuple)) else [entries]
    entries = [_with_bias(entry, left, loss.prior_bias()) for entry in entries]
    if left:
        stock = type(head).__name__
        why = 'it starts at a bias made for a sigmoid, where this loss has no gradient'
        raise InputError(_refusal(key, stock, loss, why, rule_of(head)))
    head.init_cfg = entries


def _with_bias(entry: Any, left: set[str], bias: float) -> Any:
    """A copy of an ``init_cfg`` entry; names of classifiers it sets are taken out of ``left``."""
    override = entry.get('override')
    if override is None:
        return entry
    overrides = override if isinstance(override, (list, tuple)) else [override]
    changed = []
    for item in overrides:
        item = dict(item)
        if item.get('name') in left and ('bias' in item or 'bias_prob' in item):
            left.discard(item['name'])
            if item.pop('bias_prob', None) is not None:
                item['bias'] = bias
        changed.append(item)
    return {**entry, 'override': changed}


def _check_partner(model: nn.Module, name: str, head: nn.Module) -> None:
    for cls in type(head).__mro__:
        place, wanted = _PARTNERS.get(cls.__name__, (None, None))
        if place is None:
            continue
        found = type(getattr(model, place, None))
        if wanted not in {c.__name__ for c in found.__mro__}:
            raise InputError(
                f'{cls.__name__} (`{config_key(name)}`) hands on what only {wanted} understands: '
                f"set `model.{place}.type='mmdet_lt.{wanted}'`, found {found.__name__}."
            )


def _check_epochs(name: str, head: nn.Module, by_epoch: bool) -> None:
    initial = getattr(head, 'initial_loss_cls', None)
    if initial is None or initial is head.loss_cls or by_epoch or head.initial_epoch <= 0:
        return
    raise InputError(
        f'`{config_key(name)}` would train with `initial_loss_cls` for ever: TOOD counts epochs, '
        'the training loop counts iterations; set '
        f'`{config_key(name)}.initial_loss_cls=None` or `model.train_cfg.initial_epoch=0`.'
    )
