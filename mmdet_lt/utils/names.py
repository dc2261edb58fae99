"""Compare class names across files."""

from __future__ import annotations

#: The LVIS annotation files misspell one name that MMDetection's class list corrects.
_SPELLING = {'speaker_(stero_equipment)': 'speaker_(stereo_equipment)'}


def canonical_name(name: str) -> str:
    """The name under which two spellings of one class meet."""
    return _SPELLING.get(name, name)
