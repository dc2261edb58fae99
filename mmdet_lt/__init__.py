"""mmdet_lt: rare classes and rare foreground for MMDetection 3.x detectors.

Importing the package (``custom_imports = dict(imports=['mmdet_lt'])``) registers its losses,
samplers, hooks and metrics. Where MMDetection is not installed, ``mmdet_lt.ops`` and
``mmdet_lt.ClassStatistics`` still work.
"""

from importlib.util import find_spec as _find_spec

from mmdet_lt.errors import InputError
from mmdet_lt.statistics import ClassStatistics
from mmdet_lt.version import __version__

__all__ = ['ClassStatistics', 'InputError', '__version__']

if _find_spec('mmengine') is not None and _find_spec('mmdet') is not None:
    from mmdet_lt import registration as _registration

    _registration.register_all()
