"""One cell of the matrix: build, train two iterations, compare the scores of a test."""

from __future__ import annotations

import importlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdet_lt.engine.compatibility.families import FAMILIES, C, Family, tiny_config
from mmdet_lt.engine.compatibility.scores import (
    expected_scores,
    named_layers,
    spread,
    watched,
)
from mmdet_lt.engine.compatibility.tiny import SIZE
from mmdet_lt.engine.hooks.class_statistics_hook import prepare_model
from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.registration import register_all
from mmdet_lt.registry import MODELS
from mmdet_lt.statistics import ClassStatistics

WORKS, ADAPTED, REFUSED, MISSING, BROKEN = 'works', 'adapted', 'refused', 'missing', 'broken'
STATISTICS = ClassStatistics(
    [f'class {index}' for index in range(C)], [2000, 600, 80, 9, 2], [5000, 900, 90, 9, 2], 3000
)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        status: WORKS in the stock head, ADAPTED with that of this package, REFUSED with a message,
            MISSING (a package is not installed) or BROKEN, which must not be.
        detail: The adapters, the message or the failure.
    """

    status: str
    detail: str = ''


class Broken(AssertionError):
    """A cell that neither works nor is refused."""


def losses() -> list[type[LongTailLoss]]:
    """Every registered loss, sigmoid losses first, by name."""
    register_all()
    classes = {cls for cls in MODELS.module_dict.values() if isinstance(cls, type)}
    found = [cls for cls in classes if issubclass(cls, LongTailLoss)]
    return sorted(found, key=lambda cls: (not cls.sigmoid, cls.__name__))


def run_cell(family: str, loss: type[LongTailLoss]) -> Outcome:
    """The stock head; the adapters, if it refuses the loss.

    Never raises for what a head or a loss does: that is a BROKEN cell.
    """
    settings = FAMILIES[family]
    if settings.needs is not None and not _importable(settings.needs[0]):
        return Outcome(MISSING, settings.needs[1])
    message = ''
    for adapted in (False, True) if settings.adapters else (False,):
        try:
            with quiet():
                run_model(settings, lambda adapted=adapted: _config(family, loss, adapted))
        except InputError as error:
            message = str(error)
        except Exception as error:  # whatever it is, the table must show it
            return Outcome(BROKEN, f'{type(error).__name__}: {error}')
        else:
            names = sorted(set(settings.adapters.values()))
            return Outcome(ADAPTED, ', '.join(names)) if adapted else Outcome(WORKS)
    return Outcome(REFUSED, _without_names(message, loss))


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _config(family: str, loss: type[LongTailLoss], adapted: bool) -> ConfigDict:
    options = dict(type=f'mmdet_lt.{loss.__name__}', use_sigmoid=loss.sigmoid)
    return tiny_config(family, options, adapted)


def _without_names(message: str, loss: type[LongTailLoss]) -> str:
    """A message without names where only they differ, so that cells share a footnote."""
    message = message.replace(loss.__name__, 'the loss')
    columns = r'(?:in `[^`]*` (?:of \w+ )?)?needs \d+ columns beside the classes, .* has room'
    message = re.sub(columns, 'needs more columns beside the classes, the head has room', message)
    return message[0].upper() + message[1:]


def run_model(family: Family, config: Callable[[], ConfigDict]) -> None:
    """Build a detector, train it for two iterations, compare its scores.

    Raises:
        InputError: It was refused.
        Broken: Losses, gradients, statistics or scores are wrong.
    """
    init_default_scope('mmdet')
    MessageHub.get_instance('compatibility')
    MessageHub.get_current_instance().update_info('epoch', 0)
    torch.manual_seed(0)
    model = MODELS.build(config())
    prepare_model(model, STATISTICS)
    model.init_weights()
    train(family, model)
    compare_scores(family, model)


def batch(masks: bool) -> tuple[Tensor, list[Any]]:
    """One image with three objects, and their masks."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    size = (SIZE, SIZE)
    meta = dict(img_shape=size, ori_shape=size, batch_input_shape=size, pad_shape=size)
    sample = DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)))
    boxes = torch.tensor([[4.0, 4, 36, 34], [22, 20, 60, 60], [30, 6, 58, 38]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2, C - 1]))
    if masks:
        filled = np.zeros((3, *size), dtype=np.uint8)
        for mask, (x0, y0, x1, y1) in zip(filled, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = 1
        sample.gt_instances.masks = BitmapMasks(filled, *size)
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)), [sample]


def _uses_masks(model: nn.Module) -> bool:
    return getattr(model, 'with_mask', False) or hasattr(model, 'panoptic_head')


def classification_losses(family: Family, model: nn.Module) -> list[LongTailLoss]:
    """The losses of the heads, in order."""
    found = []
    for path in family.heads:
        head: Any = model.get_submodule(path)
        heads = head if isinstance(head, nn.ModuleList) else [head]
        found += [item.loss_cls for item in heads]
    return found


def train(family: Family, model: nn.Module) -> None:
    """Two iterations; raises Broken where something is not finite, or does not learn."""
    model.train()
    images, samples = batch(_uses_masks(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    layers = named_layers(model, family.layers)
    tracked = [loss for loss in classification_losses(family, model) if loss.tags.running]
    before = [{k: v.clone() for k, v in loss.state_dict().items()} for loss in tracked]
    for _ in range(2):
        optimizer.zero_grad()
        total, log = model.parse_losses(model.loss(images, samples))
        _require(any('loss_cls' in key for key in log), 'no classification loss')
        for key, value in log.items():
            _require('loss' not in key or bool(torch.isfinite(value).all()), f'{key} is {value}')
        total.backward()
        for name, layer in layers.items():
            for part in layer.modules():
                grad = getattr(getattr(part, 'weight', None), 'grad', None)
                if isinstance(part, (nn.Linear, nn.Conv2d)):
                    _require(grad is not None and bool(grad.any()), f'no gradient in {name}')
                    _require(bool(torch.isfinite(grad).all()), f'gradient of {name} not finite')
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for loss, old in zip(tracked, before, strict=True):
        moved = any(not torch.equal(old[key], value) for key, value in loss.state_dict().items())
        _require(moved, f'running statistics of {loss.name} did not move')


def compare_scores(family: Family, model: nn.Module) -> None:
    """Every score of a test against the one computed by hand; raises Broken."""
    model.eval()
    images, samples = batch(_uses_masks(model))
    watch = (*family.layers, *family.factor)
    torch.manual_seed(1)
    with torch.no_grad():
        with watched(model, watch) as outputs:
            model.predict(images, samples)
        spread(model, watch, outputs)
        with watched(model, watch) as outputs, _extra(family, model) as extra:
            found = model.predict(images, samples)[0].pred_instances
        loss = classification_losses(family, model)[-1]
        wanted = expected_scores(family, loss, outputs, extra[0] if extra else None)
    _require(len(found) > 0, 'no detections')
    _require(int(found.labels.max()) < C, f'a detection has the label {int(found.labels.max())}')
    for label, scores in enumerate(wanted):
        got = found.scores[found.labels == label].sort(descending=True).values
        scores = scores.sort(descending=True).values
        longest = max(len(got), len(scores))
        got, scores = (
            torch.cat([part, part.new_zeros(longest - len(part))]) for part in (got, scores)
        )
        worst = (got - scores).abs().max().item() if longest else 0.0
        _require(
            worst < 2e-5, f'scores of class {label} differ by {worst:.2g} from those of the loss'
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise Broken(message)


@contextmanager
def _extra(family: Family, model: nn.Module) -> Iterator[list[Tensor]]:
    """What SABL and Mask2Former multiply the scores by and no layer gives."""
    kept: list[Tensor] = []
    if family.rule == 'sabl':
        owner, name, pick = model.roi_head.bbox_head.bbox_coder, 'decode', lambda a, out: out[1]
    elif family.rule == 'mask2former':
        owner, name = model.panoptic_fusion_head, 'instance_postprocess'
        pick = lambda args, out: args[1]  # noqa: E731
    else:
        yield kept
        return
    original = getattr(owner, name)

    def spy(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        kept.append(pick(args, out))
        return out

    setattr(owner, name, spy)
    try:
        yield kept
    finally:
        delattr(owner, name)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, neither warnings nor the log of weight initialisation."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
