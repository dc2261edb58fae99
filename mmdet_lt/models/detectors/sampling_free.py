"""Sampling-Free training of any detector: no sampling, no focal loss, no weights by foreground.

Paper: Chen et al., *Is Sampling Heuristics Necessary in Training Deep Object Detectors?*,
https://arxiv.org/abs/1909.04868. Authors' code: https://github.com/ChenJoya/sampling-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS as MMDET_MODELS
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.detectors._sampling_free_options import (
    PUBLISHED_PRIORS,
    Options,
    is_number,
    resolve_options,
)
from mmdet_lt.models.layers.guided_scaling import GuidedLossScaling, check_localisation
from mmdet_lt.models.layers.prior_state import (
    ClassThreshold,
    PriorState,
    check_prior,
    classification_heads,
    iter_biases,
    write_bias,
)
from mmdet_lt.registry import MODELS


class SamplingFreeParts(nn.Module):
    """State of Sampling-Free in a detector: ``guide`` (or None) and ``prior``.

    Raises:
        InputError: The detector has no classification head, or no localisation loss to guide it.
    """

    def __init__(self, detector: nn.Module, options: Options) -> None:
        super().__init__()
        self.options = options
        heads = classification_heads(detector)
        if not heads:
            raise InputError(
                f'{type(detector).__name__} has no head with `loss_cls` and `num_classes`: '
                'SamplingFree needs a detector that classifies boxes, correct `model.detector`.'
            )
        self.prior = PriorState({name: head.num_classes for name, head in heads.items()})
        if options.guided:
            check_localisation(detector, heads)
        self.guide = _guide(detector, options) if options.guided else None

    def given_priors(self, detector: nn.Module) -> dict[str, float]:
        """Head name to π where the config gives it.

        Raises:
            InputError: A name is no head, a head has no published prior, or π is no probability.
        """
        given = self.options.prior
        if given == 'published':
            heads = {n: detector.get_submodule(n) for n in self.prior.heads if not _in_roi(n)}
            return {name: _published(name, head) for name, head in heads.items()}
        if not isinstance(given, Mapping):
            return {}
        unknown = sorted(set(given) - set(self.prior.heads))
        if unknown:
            raise InputError(
                f'`model.sampling_free.prior` names {unknown[0]!r}: expected heads of this '
                f'detector, {list(self.prior.heads)}.'
            )
        for name, value in given.items():
            if not is_number(value):
                raise InputError(
                    f'`model.sampling_free.prior` must give a number in (0, 1) for {name!r}, found '
                    f'{value!r}.'
                )
            check_prior(name, detector.get_submodule(name), float(value))
        return {name: float(value) for name, value in given.items()}

    def measured_priors(self) -> dict[str, float]:
        """Head name to measured π of the heads whose bias it sets."""
        if not isinstance(self.options.prior, str) or self.options.prior == 'published':
            return {}
        heads = (n for n in self.prior.heads if self.options.roi_bias or not _in_roi(n))
        return {name: self.prior.prior(name) for name in heads}

    def threshold(self, head: str, configured: float, given: float | None) -> Any:
        """What ``score_thr`` of a head becomes at test."""
        kind = self.options.threshold
        if kind is None:
            return configured
        if not isinstance(kind, str):
            return kind
        values = self.prior.class_threshold(head)
        if kind == 'prior':
            rows = self.prior.rows(head)
            values = (rows[:-1].sum() / rows.sum()).float().expand_as(values)
            if given is not None:
                values = torch.where(values.isnan(), given * len(values), values)
        # A detector that was never measured keeps the number of its config.
        return ClassThreshold(torch.where(values.isnan(), configured, values))


class SamplingFreeMixin:
    """What :func:`sampling_free_detector` puts before a detector class.

    Args:
        sampling_free: Options, see docs/sampling_free.md.
    """

    def __init__(
        self, *args: Any, sampling_free: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        options = resolve_options(sampling_free, not hasattr(self, 'roi_head'))
        self.sampling_free = SamplingFreeParts(self, options)
        self._given_priors = self.sampling_free.given_priors(self)
        self._loaded: set[str] = set()
        self._ready = not options.needs_counts

    def init_weights(self) -> None:
        """Weights as the detector sets them, then the biases of given priors."""
        super().init_weights()
        self.write_priors(self._given_priors)

    def write_priors(self, priors: Mapping[str, float]) -> dict[str, str | None]:
        """Set classifier biases; returns layer name to layout, None where the bias stays.

        A classifier that came with a checkpoint is left alone.
        """
        written = {}
        for name, layer_name, layer in iter_biases(self, list(priors)):
            full = f'{name}.{layer_name}'
            if full not in self._loaded:
                written[full] = write_bias(self.get_submodule(name), layer, priors[name])
        return written

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        own = dict(self.named_parameters())
        for key, value in state_dict.items():
            name, _, kind = key.removeprefix(prefix).rpartition('.')
            if kind == 'bias' and f'{name}.bias' in own:
                if own[f'{name}.bias'].shape == value.shape:
                    self._loaded.add(name)

    def plain_loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict[str, Any]:
        """Losses of the detector itself."""
        return super().loss(batch_inputs, batch_data_samples)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict[str, Any]:
        """Losses with guided scaling."""
        if not self._ready:
            self._check_ready()
        losses = self.plain_loss(batch_inputs, batch_data_samples)
        guide = self.sampling_free.guide
        return losses if guide is None else guide(losses)

    def _check_ready(self) -> None:
        if not self.sampling_free.prior.measured():
            raise InputError(
                'the optimal prior was not measured: add '
                "`dict(type='mmdet_lt.OptimalBiasHook')` to `custom_hooks`, or give "
                '`model.sampling_free.prior` as a dict and `model.sampling_free.threshold` as a '
                'number.'
            )
        self._ready = True

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predictions with the threshold of Sampling-Free."""
        with self._thresholds():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _thresholds(self) -> Iterator[None]:
        """Put the threshold in place of ``score_thr`` of the last head."""
        roi = hasattr(self, 'roi_head')
        owner = self.roi_head if roi else getattr(self, 'bbox_head', None)
        names = [n for n in self.sampling_free.prior.heads if _in_roi(n) or not roi]
        before = getattr(owner, 'test_cfg', None)
        if before is None or not names:
            yield
            return
        configured = before.get('score_thr', 0.0)
        given = self._given_priors.get(names[-1])
        changed = before.copy()
        changed['score_thr'] = self.sampling_free.threshold(names[-1], configured, given)
        owner.test_cfg = changed
        try:
            yield
        finally:
            owner.test_cfg = before


@cache
def sampling_free_class(detector: type[BaseDetector]) -> type[BaseDetector]:
    """The sub-class of a detector class that trains without sampling heuristics."""
    name = f'SamplingFree{detector.__name__}'
    return type(name, (SamplingFreeMixin, detector), {'__module__': __name__})


@MODELS.register_module('SamplingFree')
def sampling_free_detector(
    detector: str | type[BaseDetector],
    sampling_free: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> BaseDetector:
    """Build ``detector`` with Sampling-Free: optimal bias, guided loss scaling, class thresholds.

    Parameters and their names are those of the detector; state is added below ``sampling_free``.

    Args:
        detector: Name of a registered detector, such as ``'RetinaNet'``, or its class.
        sampling_free: Options, see docs/sampling_free.md.
        kwargs: Arguments of the detector, as in its own config.

    Raises:
        InputError: ``detector`` is no detector, or an option is unknown.
    """
    cls = MMDET_MODELS.get(detector) if isinstance(detector, str) else detector
    if not (isinstance(cls, type) and issubclass(cls, BaseDetector)):
        raise InputError(
            f'`model.detector` must name a detector of MMDetection such as RetinaNet, found '
            f'{detector!r}.'
        )
    return sampling_free_class(cls)(sampling_free=sampling_free, **kwargs)


def _in_roi(name: str) -> bool:
    return name.startswith('roi_head')


def _guide(detector: nn.Module, options: Options) -> GuidedLossScaling:
    """Guided scaling with one group for each classifier that has a loss of its own."""
    groups = ['rpn'] if getattr(detector, 'rpn_head', None) is not None else []
    roi_head = getattr(detector, 'roi_head', None)
    if roi_head is None:
        groups = ['dense']
    elif isinstance(getattr(roi_head, 'bbox_head', None), nn.ModuleList):
        groups += [f's{stage}' for stage in range(len(roi_head.bbox_head))]
    else:
        groups.append('roi')
    heads = {'rpn': getattr(detector, 'rpn_head', None), 'dense': getattr(detector, 'bbox_head', 0)}
    quality = [g for g in groups if hasattr(heads.get(g), 'loss_centerness')]
    return GuidedLossScaling(
        groups,
        quality,
        momentum=options.momentum,
        clamp=options.clamp,
        freeze_after=options.freeze_after,
        roi_factor=options.roi_factor,
        guide_by=options.guide_by,
        uncertainty=options.uncertainty,
        check_finite=options.check_finite,
    )


def _published(name: str, head: nn.Module) -> float:
    for base in type(head).__mro__:
        if base.__name__ in PUBLISHED_PRIORS:
            return PUBLISHED_PRIORS[base.__name__]
    raise InputError(
        f'the 2021 code has no prior for `model.{name}` ({type(head).__name__}), only for '
        f"{list(PUBLISHED_PRIORS)}: set `model.sampling_free.prior='measure'` or give a dict."
    )
