"""Child registries of MMEngine with scope ``mmdet_lt``.

``type='mmdet_lt.X'`` works in every config, even without ``custom_imports``: MMEngine imports
this module when it meets the scope, and each registry imports its package when first asked.
"""

from __future__ import annotations

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

__all__ = [
    'DATASETS',
    'DATA_SAMPLERS',
    'HOOKS',
    'LOOPS',
    'METRICS',
    'MODELS',
    'TASK_UTILS',
    'TRANSFORMS',
]


def _child(name: str, parent: Registry, location: str) -> Registry:
    return Registry(name, parent=parent, scope='mmdet_lt', locations=[location])


MODELS = _child('model', MMENGINE_MODELS, 'mmdet_lt.models')
TASK_UTILS = _child('task util', MMENGINE_TASK_UTILS, 'mmdet_lt.models')
DATASETS = _child('dataset', MMENGINE_DATASETS, 'mmdet_lt.datasets')
DATA_SAMPLERS = _child('data sampler', MMENGINE_DATA_SAMPLERS, 'mmdet_lt.datasets')
TRANSFORMS = _child('transform', MMENGINE_TRANSFORMS, 'mmdet_lt.datasets')
HOOKS = _child('hook', MMENGINE_HOOKS, 'mmdet_lt.engine')
LOOPS = _child('loop', MMENGINE_LOOPS, 'mmdet_lt.engine')
METRICS = _child('metric', MMENGINE_METRICS, 'mmdet_lt.evaluation')
