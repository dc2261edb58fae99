"""Refuse a head and a loss that would train or score something else than the loss says.

A loss never learns which head owns it: at its first call it could not tell a RetinaNet from a TOOD
whose inputs are probabilities. So ``ClassStatisticsHook`` compares them before the first iteration,
on the whole model (:func:`check_class_counts` calls :func:`check_head`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmdet.models.roi_heads.bbox_heads import BBoxHead, DIIHead, SABLHead
from torch import nn

from mmdet_lt.engine.hooks._config_keys import config_key
from mmdet_lt.engine.hooks._head_rules import HeadRule, rule_of
from mmdet_lt.engine.hooks._head_surroundings import (
    check_predictor,
    check_roi_surroundings,
    wrong_matching,
)
from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.prior_state import classifiers
from mmdet_lt.models.losses.base import LongTailLoss

#: Heads of this package that work only below another one: {head: (place, what it must be)}.
_PARTNERS = {
    'LTDIIHead': ('roi_head', 'LTSparseRoIHead'),
    'LTMask2FormerHead': ('panoptic_fusion_head', 'LTMaskFormerFusionHead'),
}


def check_head(
    model: nn.Module, name: str, head: nn.Module, by_epoch: bool = True, of_rpn: bool = False
) -> None:
    """Compare a head with its loss; loss and head must agree on the class count.

    Args:
        model: The detector.
        name: Name of the head in it.
        head: A module with ``loss_cls``. If that is of another package, only the classifier is
            looked at.
        by_epoch: Whether the training loop counts epochs, for TOOD's first epochs.
        of_rpn: The head finds proposals, which have one class.

    Raises:
        InputError: With the head and the loss, what goes wrong, and what to write instead.
    """
    check_predictor(name, head)
    loss = head.loss_cls
    if not isinstance(loss, LongTailLoss):
        return
    if of_rpn and loss.tags.statistics:
        raise InputError(
            f'{loss.name} in `{config_key(name)}.loss_cls` balances classes, proposals have one: '
            'use the stock loss of the RPN there, and this one in the RoI head.'
        )
    if getattr(head, 'follows_loss', False):
        _check_partner(model, name, head)
        _check_epochs(name, head, by_epoch)
    else:
        _check_rule(model, name, head, loss)
    if isinstance(head, BBoxHead):
        plain = loss.context == 'roi' and score_rule(loss, head.num_classes, 'roi') == 'plain'
        plain = plain or (isinstance(head, SABLHead) and not loss.sigmoid)
        check_roi_surroundings(model, name, head, plain)


def score_rule(loss: LongTailLoss, num_classes: int, context: str = 'dense') -> str:
    """'plain' if the scores in a head are sigmoids, or a softmax, of the logits, else 'own'.

    Found by trying, on a copy: what a loss inherits says little about its scores.

    Args:
        loss: The loss.
        num_classes: C.
        context: 'dense' or 'roi', the kind of head.
    """
    columns = num_classes + loss.extra_columns
    if context == 'dense':
        columns = loss.dense_columns(num_classes)
    if columns not in (num_classes, num_classes + 1) or (loss.sigmoid and columns > num_classes):
        return 'own'
    device = next((buffer.device for buffer in loss.buffers()), 'cpu')
    z = torch.linspace(-5, 5, 4 * columns, device=device).reshape(columns, 4).T
    loss = copy.deepcopy(loss)
    loss.context = context
    scores = loss.get_activation(z)[:, :num_classes]
    wanted = z.sigmoid() if loss.sigmoid else z.softmax(1)[:, :-1]
    return 'plain' if torch.allclose(scores, wanted, atol=1e-6) else 'own'


def _check_rule(model: nn.Module, name: str, head: nn.Module, loss: LongTailLoss) -> None:
    rule, stock, key = rule_of(head), type(head).__name__, config_key(name)
    of_roi = isinstance(head, BBoxHead) and not isinstance(head, DIIHead)
    if loss.dense_columns(head.num_classes) is None and not of_roi:
        raise InputError(
            f'{loss.name} in `{key}.loss_cls` needs {loss.extra_columns} columns '
            f'beside the classes, {stock} has room for one at most: use it in an RoI head such as '
            'Shared2FCBBoxHead.'
        )
    allowed = rule.sigmoid if loss.sigmoid else rule.softmax
    if allowed == 'plain' and score_rule(loss, head.num_classes) == 'own':
        allowed = 'no'
    if allowed == 'no':
        raise InputError(_refusal(key, stock, loss, rule.why, rule))
    why = _wrong_training(head, loss)
    if why:
        raise InputError(_refusal(key, stock, loss, why, rule))
    why, advice = wrong_matching(model, name, head)
    if why:
        raise InputError(_refusal(key, stock, loss, why, rule, advice))
    if of_roi:
        _check_roi_width(key, head, loss, rule)
    elif loss.tags.bounded_logits and loss.prior_bias() is not None:
        set_start_bias(key, head, loss)


def _refusal(
    key: str, stock: str, loss: LongTailLoss, why: str, rule: HeadRule, advice: str = ''
) -> str:
    kind = 'sigmoid' if loss.sigmoid else 'softmax'
    if not advice and rule.use and (loss.sigmoid or rule.use_softmax):
        advice = f"set `{key}.type='mmdet_lt.{rule.use}'`"
    elif not advice:
        works = rule.softmax if loss.sigmoid else rule.sigmoid
        refused = rule.sigmoid if loss.sigmoid else rule.softmax
        other = refused == 'no' and works != 'no'
        other = f', or a {"softmax" if loss.sigmoid else "sigmoid"} loss' if other else ''
        advice = f'use a detector with {rule.instead}{other}'
    return f'{stock} cannot be used with {loss.name} ({kind}): {why}; {advice}.'


def _wrong_training(head: nn.Module, loss: LongTailLoss) -> str:
    """What a stock head would feed the loss wrongly, or do to its result; '' if nothing."""
    names = {cls.__name__ for cls in type(head).__mro__}
    if 'DINOHead' in names and loss.tags.running:
        return 'its denoising queries would be counted by the running statistics'
    if 'DeformableDETRHead' in names and 'DINOHead' not in names and head.as_two_stage:
        return 'its encoder gives every object the label of class 0'
    if 'MaskFormerHead' in names and not isinstance(loss.class_weight, (list, tuple)):
        return '`loss_cls.class_weight` must be a list of C + 1 numbers'
    if 'RTMDetHead' in names and loss.tags.own_normalizer:
        return 'it divides the loss, which has a divisor of its own, a second time'
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
