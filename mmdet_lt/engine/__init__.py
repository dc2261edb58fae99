"""Engine of mmdet_lt; importing the package registers everything in it."""

from mmdet_lt.utils.discovery import import_submodules

import_submodules(__name__)
