"""The options of Sampling-Free: two published generations and the robust form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mmdet_lt.errors import InputError

#: Priors of the 2021 code, by head of MMDetection; a sub-class takes that of its nearest base.
PUBLISHED_PRIORS = {
    'RetinaHead': 1e-5,
    'FCOSHead': 1e-4,
    'RPNHead': 1e-4,
    'ATSSHead': 3e-3,
    'PAAHead': 3e-3,
}


@dataclass(frozen=True)
class Options:
    """Keys of ``model.sampling_free``; see docs/sampling_free.md."""

    generation: str = 'robust'
    #: 'measure', 'published', a measured file (.json), head name to π, or None.
    prior: Any = 'measure'
    #: Whether the bias of RoI classifiers is set, too.
    roi_bias: bool = True
    guided: bool = True
    momentum: float = 0.9
    clamp: tuple[float, float] | None = (1e-3, 1e3)
    freeze_after: int | None = None
    guide_by: str = 'box'
    roi_factor: float = 2.0
    uncertainty: bool = False
    check_finite: bool = True
    #: 'class', 'prior' (C π, one number), 'published', a number, or None (that of test_cfg).
    threshold: Any = 'class'

    @property
    def needs_counts(self) -> bool:
        """Whether rows must be counted before training."""
        return (
            isinstance(self.prior, str) and self.prior != 'published' or self.threshold == 'class'
        )

    @property
    def prior_file(self) -> str | None:
        """The file of a measured prior."""
        named = isinstance(self.prior, str) and self.prior not in ('measure', 'published')
        return self.prior if named else None


def _presets(one_stage: bool) -> dict[str, Options]:
    robust = Options()
    every = replace(robust, momentum=0.0, clamp=None, roi_bias=False)
    first = replace(every, generation='2020', threshold='prior' if one_stage else 1e-4)
    final = replace(every, generation='2021', prior='published', threshold=1e-3)
    if one_stage:
        final = replace(final, freeze_after=100, guide_by='mean', uncertainty=True)
    return {'robust': robust, '2020': first, '2021': final}


def resolve_options(given: Mapping[str, Any] | None, one_stage: bool) -> Options:
    """Options of a generation with the given keys on top.

    Raises:
        InputError: Unknown keys or values.
    """
    given = dict(given or {})
    known = [field.name for field in fields(Options)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(
            f'`model.sampling_free` has no key {unknown[0]!r}: expected one of {known}.'
        )
    presets = _presets(one_stage)
    generation = str(given.pop('generation', 'robust'))
    if generation not in presets:
        raise InputError(
            f'`model.sampling_free.generation` must be one of {list(presets)}, found '
            f'{generation!r}.'
        )
    options = replace(presets[generation], **given)
    _check(options)
    return options


def _check(options: Options) -> None:
    def demand(good: bool, key: str, expected: str) -> None:
        if not good:
            raise InputError(
                f'`model.sampling_free.{key}` must be {expected}, found {getattr(options, key)!r}.'
            )

    prior, threshold = options.prior, options.threshold
    for key in ('guided', 'uncertainty', 'check_finite', 'roi_bias'):
        demand(isinstance(getattr(options, key), bool), key, 'True or False')
    demand(is_number(options.momentum) and 0 <= options.momentum < 1, 'momentum', 'in [0, 1)')
    clamp = options.clamp
    demand(
        clamp is None or (len(clamp) == 2 and 0 < clamp[0] <= clamp[1]),
        'clamp',
        'None or (low, high) with 0 < low <= high',
    )
    after = options.freeze_after
    demand(
        after is None or (type(after) is int and after >= 1),
        'freeze_after',
        'None or a number of iterations of at least 1',
    )
    demand(is_number(options.roi_factor) and options.roi_factor > 0, 'roi_factor', 'above 0')
    demand(options.guide_by in ('box', 'mean'), 'guide_by', "'box' or 'mean'")
    demand(options.guided or not options.uncertainty, 'uncertainty', 'False when `guided` is False')
    named = isinstance(prior, str) and (
        prior in ('measure', 'published') or prior.endswith('.json')
    )
    demand(
        prior is None or named or isinstance(prior, Mapping),
        'prior',
        "'measure', 'published', a .json file, a dict of head names or None",
    )
    demand(
        threshold in (None, 'class', 'prior') or (is_number(threshold) and 0 <= threshold < 1),
        'threshold',
        "'class', 'prior', a number in [0, 1) or None",
    )


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number, not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
