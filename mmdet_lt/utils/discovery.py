"""Import every module of a package, so that a new file is found without editing a list."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def import_submodules(package: ModuleType | str) -> list[ModuleType]:
    """Import all public modules below ``package`` in sorted order.

    Modules whose last name begins with an underscore are left to their users.

    Args:
        package: A package or its dotted name.

    Returns:
        The imported modules.
    """
    if isinstance(package, str):
        package = importlib.import_module(package)
    found = sorted(
        info.name
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + '.')
        if not info.name.rsplit('.', 1)[1].startswith('_')
    )
    return [importlib.import_module(name) for name in found]
