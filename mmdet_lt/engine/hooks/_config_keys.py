"""Config keys of modules, for messages."""

from __future__ import annotations


def config_key(module_name: str) -> str:
    """Config key of a module: ``roi_head.bbox_head.0`` is ``model.roi_head.bbox_head[0]``.

    Student and teacher of a semi-supervised detector have the config ``model.detector``.
    """
    key = 'model'
    first, dot, rest = module_name.partition('.')
    if first in ('student', 'teacher'):
        module_name = f'detector{dot}{rest}'
    for part in module_name.split('.'):
        key += f'[{part}]' if part.isdigit() else f'.{part}'
    return key
