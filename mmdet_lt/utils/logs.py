"""What MMEngine logged during a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_scalars(folder: Path) -> list[dict[str, Any]]:
    """All lines of the ``scalars.json`` files below a work directory, oldest first, over restarts.

    MMEngine writes one file per start, below a folder named by its time. A line that is not
    complete JSON, of a run that was killed or is writing right now, is left out.
    """
    lines = []
    for path in sorted(folder.rglob('scalars.json')):
        for text in path.read_text(encoding='utf-8', errors='replace').splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            if isinstance(line, dict):
                lines.append(line)
    return lines
