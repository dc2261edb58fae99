"""Take one parameter of a built optimiser out of weight decay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn


def exempt_from_decay(
    optim_wrapper: OptimWrapper | OptimWrapperDict, parameter: nn.Parameter, schedulers: Any
) -> None:
    """Give ``parameter`` weight decay 0, whatever ``paramwise_cfg`` says; the others keep theirs.

    A parameter that shares its group gets a group of its own, a copy of that group at the end of
    the list, which schedulers then treat as they treat the one it came from. Call it before a
    checkpoint is loaded, which has that group, too.

    Args:
        optim_wrapper: MMEngine's wrapper of one optimiser, or of several.
        parameter: The parameter; nothing happens if no optimiser has it.
        schedulers: ``runner.param_schedulers``: None, a list, or a dict of lists.
    """
    for wrapper in _wrappers(optim_wrapper):
        optimizer = wrapper.optimizer
        for index, group in enumerate(list(optimizer.param_groups)):
            if not group.get('weight_decay') or all(p is not parameter for p in group['params']):
                continue
            if len(group['params']) == 1:
                group['weight_decay'] = 0.0
                continue
            group['params'] = [p for p in group['params'] if p is not parameter]
            optimizer.add_param_group(dict(group, params=[parameter], weight_decay=0.0))
            for scheduler in _schedulers(schedulers):
                if getattr(scheduler, 'optimizer', None) in (optimizer, wrapper):
                    _extend(scheduler, index)


def _wrappers(optim_wrapper: OptimWrapper | OptimWrapperDict) -> list[OptimWrapper]:
    if isinstance(optim_wrapper, OptimWrapperDict):
        return list(optim_wrapper.values())
    return [optim_wrapper]


def _schedulers(schedulers: Any) -> Iterator[Any]:
    if isinstance(schedulers, Mapping):
        for some in schedulers.values():
            yield from some
    else:
        yield from schedulers or ()


def _extend(scheduler: Any, index: int) -> None:
    """Let a scheduler treat a new last group as that of ``index``."""
    # Names of MMEngine: base values, last values, lower bounds (plateau schedulers).
    for name in ('base_values', '_last_value', 'min_value'):
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and index < len(values):
            values.append(values[index])
