"""Let torch's safe loader read the checkpoints that mmengine writes.

From torch 2.6 on, ``torch.load`` reads with ``weights_only=True`` and refuses a training
checkpoint of mmengine, because next to weights it holds log histories, numpy scalars and, through
them, ``getattr``. This module names exactly those things as safe; the safe loader stays on.
"""

from __future__ import annotations

import functools
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

# Number kinds, bool, bytes and str: what numpy scalars and arrays in a checkpoint can hold. Arrays
# of objects are left out on purpose.
_DTYPE_CODES = ('?', *'bhilqBHILQ', 'e', 'f', 'd', 'g', 'F', 'D', 'S', 'U')


def allow_mmengine_checkpoints() -> bool:
    """Tell torch which objects of a checkpoint written by mmengine are safe to rebuild.

    Adds to torch's list of safe globals; cheap, and a second call changes nothing. The onedl fork
    of mmengine takes entries off that list after each checkpoint it loads, so this is called again
    before a file is read. Below torch 2.6 there is nothing to do: ``torch.load`` as called by
    mmengine is not restricted there.

    Returns:
        Whether the safe loader of this torch was extended (now or by an earlier call).
    """
    if not _takes_named_globals():
        return False
    torch.serialization.add_safe_globals(_safe_globals())
    return True


@functools.cache
def _safe_globals() -> list[Any]:
    return [*_numpy_globals(), *_mmengine_globals()]


def _takes_named_globals() -> bool:
    """Whether ``add_safe_globals`` exists and takes (object, name) pairs: torch 2.6 and later."""
    major, minor = (int(part) for part in torch.__version__.split('.')[:2])
    return (major, minor) >= (2, 6) and hasattr(torch.serialization, 'add_safe_globals')


def _numpy_globals() -> list[Any]:
    # numpy 2 renamed numpy.core to numpy._core. A checkpoint names the module of the numpy that
    # wrote it, so both names are given whichever numpy is installed here.
    here = 'numpy._core' if int(np.__version__.split('.')[0]) >= 2 else 'numpy.core'
    multiarray = importlib.import_module(f'{here}.multiarray')
    named = [
        (getattr(multiarray, function), f'{module}.multiarray.{function}')
        for function in ('scalar', '_reconstruct')
        for module in ('numpy.core', 'numpy._core')
    ]
    # The loader also checks the type of a finished object; a dtype object has a type of its own
    # (numpy.dtypes.Float64DType).
    dtype_types = {type(np.dtype(code)) for code in _DTYPE_CODES}
    return [*named, np.ndarray, np.dtype, *dtype_types]


def _mmengine_globals() -> list[Any]:
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer

    # ConfigDict: nested dicts in the `metainfo` of a dataset, saved as meta.dataset_meta.
    return [HistoryBuffer, ConfigDict, *_method_globals(HistoryBuffer)]


def _method_globals(history_buffer: type) -> list[Any]:
    """``getattr`` as mmengine needs it, and the class it is applied to.

    A HistoryBuffer pickles its own methods, and a one-cycle scheduler its annealing function. Both
    become "call ``getattr`` on a class" in the file. Python's ``getattr`` must not be allowed: a
    crafted file could walk with it from any class to any function. So the name stands for a
    function that hands out only these methods.
    """
    methods: dict[tuple[type, str], Callable] = {
        (history_buffer, name): getattr(history_buffer, name)
        for name in ('min', 'max', 'mean', 'current')
    }
    classes = []
    try:
        schedulers = importlib.import_module('mmengine.optim.scheduler.param_scheduler')
        one_cycle = schedulers.OneCycleParamScheduler
    except (ImportError, AttributeError):  # an mmengine without one-cycle schedulers
        pass
    else:
        classes.append(one_cycle)
        for name in ('_annealing_cos', '_annealing_linear'):
            if hasattr(one_cycle, name):
                methods[one_cycle, name] = getattr(one_cycle, name)

    def known_method(owner: Any, name: Any) -> Callable:
        for (cls, method), function in methods.items():
            if owner is cls and name == method:
                return function
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not part of a checkpoint')

    return [*classes, (known_method, 'builtins.getattr')]
