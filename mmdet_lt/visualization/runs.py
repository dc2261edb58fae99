"""What a finished run left in its work directory."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import read_json
from mmdet_lt.utils.logs import read_scalars


@dataclass(eq=False)
class RunRecord:
    """Inputs of the report from one work directory; what is missing is empty.

    Attributes:
        label: Name of the run in the report.
        folder: The work directory.
        detail: Content of ``lvis_detail.json`` of :class:`mmdet_lt.LVISMetric`.
        scalars: Logged lines of mmengine, oldest first, over restarts.
        result: Content of ``result.json`` and ``seconds.json``.
        examples: Content of ``examples.json``.
        examples_folder: Where relative image paths start.
        problems: Sentences about damaged files.
    """

    label: str
    folder: Path
    detail: dict[str, Any] = field(default_factory=dict)
    scalars: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    examples_folder: Path = Path('.')
    problems: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """Wall time of the run, if it was written down."""
        value = self.result.get('seconds')
        return float(value) if isinstance(value, (int, float)) else None

    def metrics(self) -> list[str]:
        """'bbox' and 'segm' as far as there are results."""
        return [name for name in ('bbox', 'segm') if self.overall(name)]

    def overall(self, metric: str) -> dict[str, float]:
        """AP and its relatives as fractions, -1 if undefined.

        From the detail file, else from ``result.json``, else from the last validation in the log.
        """
        stated = self.detail.get(metric, {}).get('overall')
        if stated:
            return stated
        for source in (self.result, *reversed(self.scalars)):
            values = {
                key.rsplit('/', 1)[-1].removeprefix(f'{metric}_'): value
                for key, value in source.items()
                if key.rsplit('/', 1)[-1].startswith(f'{metric}_AP')
                and isinstance(value, (int, float))
            }
            if 'AP' in values:
                return values
        return {}

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Iterations and values of a logged training scalar, each iteration once.

        After a restart from an older checkpoint, the later line of an iteration counts.
        """
        points = {}
        for line in self.scalars:
            value = line.get(name, line.get(f'train/{name}'))
            step = line.get('iter', line.get('step'))
            if isinstance(value, (int, float)) and isinstance(step, (int, float)):
                points[step] = value
        steps = sorted(points)
        return np.array(steps, dtype=float), np.array([points[s] for s in steps], dtype=float)


def load_run(label: str, folder: str | os.PathLike) -> RunRecord:
    """Read a work directory; files may lie in sub-folders.

    Where a name occurs more than once, such as in one folder per seed, the most recent is used
    (for the log: all logs of the folder that holds the most recent one).

    Raises:
        InputError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f'work directory {folder} does not exist: correct the path.')
    run = RunRecord(label, folder)
    detail = _load(run, 'lvis_detail.json', dict)
    run.detail = detail or {}
    for name in ('seconds.json', 'result.json'):
        run.result.update(_load(run, name, dict) or {})
    run.examples = _load(run, 'examples.json', list) or []
    newest = _newest(folder, 'examples.json')
    run.examples_folder = newest.parent if newest else folder
    run.scalars = _scalars(folder)
    return run


def _newest(folder: Path, pattern: str) -> Path | None:
    files = sorted(folder.rglob(pattern))
    return max(files, key=lambda file: file.stat().st_mtime, default=None)


def _load(run: RunRecord, name: str, kind: type) -> Any:
    """Content of the newest file called ``name``; a damaged one is noted and left out."""
    path = _newest(run.folder, name)
    if path is None:
        return None
    try:
        data = read_json(path, key='work directory', what='file')
    except InputError:
        run.problems.append(f'{run.label}: {name} is not complete JSON.')
        return None
    if not isinstance(data, kind):
        run.problems.append(f'{run.label}: {name} should hold a JSON {kind.__name__}.')
        return None
    return data


def _scalars(folder: Path) -> list[dict[str, Any]]:
    newest = _newest(folder, 'scalars.json')
    if newest is None:
        return []
    # <run>/<time stamp>/vis_data/scalars.json: restarts are sibling time stamps of one run
    root = newest.parents[2] if newest.parent.name == 'vis_data' else newest.parent
    root = root if root == folder or folder in root.parents else newest.parent
    return read_scalars(root)
