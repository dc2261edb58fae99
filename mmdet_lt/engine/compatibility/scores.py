"""Scores of a detector computed by hand from the outputs of its classifier layers.

Nothing here calls the code of a head: the layers are watched, and what the detector should give is
worked out from the formula of the family and the loss's ``get_activation``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_lt.engine.compatibility.families import C, Family
from mmdet_lt.models.losses.base import LongTailLoss


def named_layers(model: nn.Module, endings: tuple[str, ...]) -> dict[str, nn.Module]:
    """Modules of the detection head whose name, or that of the list they are in, ends so."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = name.rpartition('.')[0] in found  # a layer of a Sequential watched as a whole
        wanted = _ends(name, endings) and 'rpn_head' not in name and not inside
        if wanted and not isinstance(module, nn.ModuleList):
            found[name] = module
    return found


@contextmanager
def watched(model: nn.Module, endings: tuple[str, ...]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, the outputs of the layers are kept, by name in module order."""
    layers = named_layers(model, endings)
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(
            lambda module, inputs, out, name=name: outputs[name].append(out.detach())
        )
        for name, layer in layers.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def spread(model: nn.Module, endings: tuple[str, ...], outputs: dict[str, list[Tensor]]) -> None:
    """Give the layers weights with which their outputs vary.

    Those of a detector at its start hardly do: any activation would give nearly the same scores.
    """
    for name, layer in named_layers(model, endings).items():
        layer = layer[-1] if isinstance(layer, nn.Sequential) else layer
        if not outputs[name]:
            continue
        std = torch.cat([out.flatten() for out in outputs[name]]).std().clamp_min(1e-6)
        with torch.no_grad():
            layer.weight.mul_(torch.clamp(1.5 / std, max=1e3))
            layer.bias.normal_()


def expected_scores(
    family: Family, loss: LongTailLoss, outputs: dict[str, list[Tensor]], extra: Any
) -> list[Tensor]:
    """Scores of each class, (any,) each, that the test should give.

    Args:
        family: Says how they follow from the layers.
        loss: That of the head, of the last one in a cascade.
        outputs: Those of the layers, see :func:`watched`.
        extra: What no layer gives: confidences of SABL, masks of Mask2Former.
    """
    classes = [out for name in outputs if _ends(name, family.layers) for out in outputs[name]]
    factors = [out for name in outputs if _ends(name, family.factor) for out in outputs[name]]
    rule = RULES[family.rule]
    scores = rule(loss, classes, factors, extra)
    if family.rule == 'yolox' or (family.rule == 'detr' and not loss.sigmoid):
        best = scores.argmax(1, keepdim=True)  # these give one class of a row
        scores = torch.full_like(scores, float('nan')).scatter(1, best, scores.gather(1, best))
    return [column[torch.isfinite(column)] for column in scores.T]


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    listed = name.rpartition('.')[0] if name.rpartition('.')[2].isdigit() else name
    return any(f'.{name}'.endswith(f'.{end}') or listed.endswith(f'.{end}') for end in endings)


def by_hand(loss: LongTailLoss, z: Tensor) -> Tensor:
    """(N, C): the activation of the loss, without the background column of RoI heads."""
    return loss.get_activation(z)[:, :C]


def rows(maps: list[Tensor], columns: int) -> Tensor:
    """Feature maps (1, A * K, H, W) as rows (any, K)."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(-1, columns) for x in maps])


def _columns(loss: LongTailLoss) -> int:
    return C + int(not loss.sigmoid)


def _dense(loss: LongTailLoss, classes: list[Tensor], factors: list[Tensor], extra: Any) -> Tensor:
    scores = by_hand(loss, rows(classes, _columns(loss)))
    return scores * rows(factors, 1).sigmoid() if factors else scores


def _paa(loss: LongTailLoss, classes: list[Tensor], factors: list[Tensor], extra: Any) -> Tensor:
    return _dense(loss, classes, factors, extra).sqrt()


def _tood(loss: LongTailLoss, classes: list[Tensor], factors: list[Tensor], extra: Any) -> Tensor:
    a, b = rows(classes, _columns(loss)).double(), rows(factors, 1).double()
    p = (a.sigmoid() * b.sigmoid()).sqrt()
    return by_hand(loss, (p / (1 - p)).log().float())


def _yolof(loss: LongTailLoss, classes: list[Tensor], factors: list[Tensor], extra: Any) -> Tensor:
    z, o = rows(classes, C).double(), rows(factors, 1).double()
    return by_hand(loss, (z + o - torch.log1p(z.exp() + o.exp())).float())


def _roi(loss: LongTailLoss, classes: list[Tensor], factors: list[Tensor], extra: Any) -> Tensor:
    return by_hand(loss, torch.stack(classes).mean(0))  # a cascade averages the logits


def _sabl(loss: LongTailLoss, classes: list[Tensor], factors: list[Tensor], extra: Any) -> Tensor:
    return _roi(loss, classes, factors, extra) * extra[:, None]


def _last(loss: LongTailLoss, classes: list[Tensor], factors: list[Tensor], extra: Any) -> Tensor:
    z = classes[-1]
    z = z[-1] if z.dim() == 4 else z  # all decoder layers at once
    return by_hand(loss, z.reshape(-1, z.shape[-1]))


def _mask2former(
    loss: LongTailLoss, classes: list[Tensor], factors: list[Tensor], extra: Any
) -> Tensor:
    inside = extra > 0
    mean = (extra.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    return _last(loss, classes, factors, extra) * mean[:, None]


RULES = {
    'dense': _dense,
    'paa': _paa,
    'tood': _tood,
    'yolox': _dense,
    'yolof': _yolof,
    'roi': _roi,
    'sabl': _sabl,
    'sparse': _last,
    'detr': _last,
    'mask2former': _mask2former,
}
