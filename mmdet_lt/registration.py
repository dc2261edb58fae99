"""Make every class of the package findable, with and without the scope prefix."""

from __future__ import annotations

import importlib

from mmengine.registry import Registry

from mmdet_lt import registry as own

_PACKAGES = ('models', 'datasets', 'engine', 'evaluation')


def register_all() -> None:
    """Import the package's modules and offer free names in MMDetection's own registries.

    A name that MMDetection or MMEngine uses already (``LVISMetric``, ``IterBasedTrainLoop``) stays
    theirs; ours then needs its scope, ``type='mmdet_lt.LVISMetric'``. MMDetection's modules are
    imported first: registering a name before the host does would make the host's own import fail.
    """
    from mmdet_lt.engine.compat import allow_mmengine_checkpoints

    for name in _PACKAGES:
        importlib.import_module(f'mmdet.{name}')
        importlib.import_module(f'mmdet_lt.{name}')
    host = importlib.import_module('mmdet.registry')
    for name in own.__all__:
        _offer(getattr(own, name), getattr(host, name))
    allow_mmengine_checkpoints()


def _offer(source: Registry, target: Registry) -> None:
    for name, cls in source.module_dict.items():
        if not _is_taken(name, target):
            target.register_module(name=name, module=cls)


def _is_taken(name: str, registry: Registry | None) -> bool:
    """Whether a registry or one above it has the name."""
    while registry is not None:
        if name in registry.module_dict:
            return True
        registry = registry.parent
    return False
