"""Measured class priors of the classification heads of a detector, and what follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.optimal_bias import optimal_prior, sigmoid_bias, softmax_biases

#: Length of a fingerprint as stored in checkpoints, in int64 numbers.
MARK_LENGTH = 2


def classification_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Name to module of every head with a ``loss_cls`` and a class count, in module order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, 'loss_cls', None), nn.Module)
        and isinstance(getattr(module, 'num_classes', None), int)
    }


def classifiers(head: nn.Module) -> dict[str, nn.Module]:
    """Name to layer of the classifier(s) of a head: one, or one for each pyramid level.

    A classifier is a layer with bias that has 'cls' in its name (or in that of the list it is in)
    and the outputs the head needs; the towers before it (``cls_convs``) are not.
    """
    found = {}
    priors, columns = getattr(head, 'num_base_priors', 1), getattr(head, 'cls_out_channels', None)
    for name, layer in head.named_modules():
        parts = name.split('.')
        own = parts[-2] if parts[-1].isdigit() and len(parts) > 1 else parts[-1]
        outputs = getattr(layer, 'out_channels', getattr(layer, 'out_features', None))
        if 'cls' not in own or 'convs' in name or not isinstance(outputs, int):
            continue
        right = own == 'fc_cls' or (columns is not None and outputs == priors * columns)
        if right and isinstance(getattr(layer, 'bias', None), Tensor):
            found[name] = layer
    return found


def classifier_layout(head: nn.Module, layer: nn.Module) -> str | None:
    """'sigmoid' (C columns), 'softmax' (C + 1, background last) or None for any other layout."""
    outputs = layer.bias.numel()
    columns = getattr(head, 'cls_out_channels', None)
    columns = outputs if columns is None or outputs % columns else columns
    sigmoid = getattr(head, 'use_sigmoid_cls', getattr(head.loss_cls, 'use_sigmoid', False))
    if sigmoid and columns == head.num_classes:
        return 'sigmoid'
    if not sigmoid and columns == head.num_classes + 1:
        return 'softmax'
    return None


def check_prior(name: str, head: nn.Module, prior: float) -> None:
    """Refuse a ``π`` with which no bias of this head's classifier can begin.

    Raises:
        InputError: ``π``, or ``C π`` of a softmax classifier, is not in (0, 1).
    """
    layouts = {classifier_layout(head, layer) for layer in classifiers(head).values()}
    try:
        sigmoid_bias(prior)
        if 'softmax' in layouts:
            softmax_biases(prior, head.num_classes)
    except InputError as error:
        raise InputError(f'`model.{name}`: {error}') from error


def write_bias(head: nn.Module, layer: nn.Module, prior: float) -> str | None:
    """Set the bias of a classifier to the optimal one for ``π = prior``; returns its layout.

    A layout that is neither 'sigmoid' nor 'softmax' keeps its bias.
    """
    layout = classifier_layout(head, layer)
    with torch.no_grad():
        if layout == 'sigmoid':
            layer.bias.fill_(sigmoid_bias(prior))
        elif layout == 'softmax':
            b_fg, b_bg = softmax_biases(prior, head.num_classes)
            bias = layer.bias.view(-1, head.num_classes + 1)
            bias[:, :-1] = b_fg
            bias[:, -1] = b_bg
    return layout


class PriorState(nn.Module):
    """How many rows of each class the loss of each head received, and of which data and detector.

    Buffers, saved in checkpoints: one float64 (C + 1,) for each head, background last, NaN before
    anything was measured; ``data_mark`` and ``detector_mark``, int64 (2,).

    Args:
        num_classes: Name to class count of the heads.
    """

    def __init__(self, num_classes: Mapping[str, int]) -> None:
        super().__init__()
        self.heads = tuple(num_classes)
        for name, count in num_classes.items():
            rows = torch.full((count + 1,), float('nan'), dtype=torch.float64)
            self.register_buffer(_buffer(name), rows)
        for name in ('data_mark', 'detector_mark'):
            self.register_buffer(name, torch.zeros(MARK_LENGTH, dtype=torch.int64))

    def rows(self, head: str) -> Tensor:
        """Rows of each class of one head, float64 (C + 1,)."""
        return getattr(self, _buffer(head))

    def measured(self) -> bool:
        """Whether all heads have counts."""
        return all(bool(torch.isfinite(self.rows(head)).all()) for head in self.heads)

    def marks(self) -> dict[str, list[int]]:
        """The fingerprints of data and detector."""
        return dict(data=self.data_mark.tolist(), detector=self.detector_mark.tolist())

    def put(self, rows: Mapping[str, Sequence[float]], marks: Mapping[str, Sequence[int]]) -> None:
        """Store counts and the fingerprints they belong to.

        Raises:
            InputError: Heads or class counts differ from those of the detector.
        """
        for head in self.heads:
            old, new = self.rows(head), torch.as_tensor(rows.get(head, ()), dtype=torch.float64)
            if new.shape != old.shape:
                raise InputError(
                    f'the measured prior is of another detector: expected {len(old)} counts for '
                    f'`model.{head}`, found {len(new)} (heads {sorted(rows)}): measure it again '
                    "with `model.sampling_free.prior='measure'`."
                )
            setattr(self, _buffer(head), new.to(old.device))
        for name, values in marks.items():
            old = getattr(self, f'{name}_mark')
            setattr(self, f'{name}_mark', torch.tensor(list(values), device=old.device))

    def prior(self, head: str) -> float:
        """``π`` of one head.

        Raises:
            InputError: No foreground row was counted.
        """
        rows = self.rows(head)
        foreground = float(rows[:-1].sum())
        try:
            return optimal_prior(foreground, float(rows.sum()), len(rows) - 1)
        except InputError as error:
            raise InputError(f'`model.{head}`: {error}') from error

    def class_threshold(self, head: str) -> Tensor:
        """``θ_j = (N_f / N) (N_j / Σ_k N_k)``, float32 (C,), NaN before anything was measured.

        A class without a row counts as if it had one, so that its threshold is above 0.
        """
        rows = self.rows(head)
        classes = rows[:-1]
        share = classes.clamp_min(1) / classes.sum().clamp_min(1)
        return (classes.sum() / rows.sum().clamp_min(1) * share).float()


def _buffer(head: str) -> str:
    return 'rows_' + head.replace('.', '_')


class ClassThreshold:
    """Stands in for ``score_thr`` in ``scores > score_thr``, with a number for each class.

    Heads compare scores of shape (N, C), flattened from it, or (N, C + 1) with a column for
    background (PAA's score voting), which is above no threshold.

    Args:
        values: Thresholds, (C,).
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        scores, threshold = args[:2]
        if func not in (torch.Tensor.__gt__, torch.Tensor.gt) or not isinstance(threshold, cls):
            raise InputError(
                'class-adaptive thresholds need a head that keeps `scores > score_thr`, this one '
                f'calls `{getattr(func, "__name__", func)}`: set '
                '`model.sampling_free.threshold` to a number, or None for `test_cfg.score_thr`.'
            )
        values = threshold.values.to(scores)
        if scores.dim() > 1 and scores.shape[-1] == len(values) + 1:
            values = torch.cat([values, values.new_full((1,), math.inf)])
        return (scores.reshape(-1, len(values)) > values).view(scores.shape)


def iter_biases(model: nn.Module, heads: Sequence[str]) -> Iterator[tuple[str, str, nn.Module]]:
    """(head name, layer name, layer) of the classifiers of the given heads.

    Raises:
        InputError: A head has no classifier that can be recognised.
    """
    for name in heads:
        head = model.get_submodule(name)
        layers = classifiers(head)
        if not layers:
            raise InputError(
                f'no classifier with a bias found in `model.{name}` ({type(head).__name__}): '
                f'expected a layer with `cls` in its name; leave the head its own bias with '
                '`model.sampling_free.prior=None`.'
            )
        for layer_name, layer in layers.items():
            yield name, layer_name, layer
