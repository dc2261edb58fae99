"""The folder of one run of a comparison: whose it is, and how an interrupted run goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdet_lt.engine.work_dir import last_checkpoint, saved_checkpoints
from mmdet_lt.errors import InputError
from mmdet_lt.utils.logs import read_scalars


def fingerprint(text: str) -> str:
    """Fingerprint of the text of a config."""
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def read_small(path: Path) -> dict[str, Any]:
    """A small JSON file, empty if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_folder(folder: Path, config: Path, mark: str, overwrite: bool) -> None:
    """Keep the results of another config.

    Args:
        folder: Where the run goes.
        config: The config file that was asked for.
        mark: Fingerprint of its config.
        overwrite: Delete them instead.

    Raises:
        InputError: The folder holds a run of another config.
    """
    marks = {
        content.get('fingerprint')
        for name in ('started.json', 'result.json')
        if (content := read_small(folder / name))
    }
    if not marks and any(folder.glob('*.pth')):
        marks = {None}
    if marks <= {mark}:
        return
    if not overwrite:
        raise InputError(
            f'{folder} holds a run of another config, other iterations or another version of '
            f'{config}: give another `--out`, delete that folder, or let `--overwrite` do so.'
        )
    shutil.rmtree(folder)


@contextmanager
def alone(folder: Path, tell: Callable[[str], Any]) -> Iterator[int]:
    """Wait until no other process trains in ``folder``; yields the lock, for the training to hold.

    A training outlives a comparison that was killed.
    """
    with open(folder / 'lock', 'w', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f'waiting for the training that an earlier comparison left in {folder}')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def evaluations(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a log that hold metrics."""
    return [line for line in logged if 'loss' not in line and any('/' in k for k in line)]


def start_options(folder: Path, iters: int) -> list[str]:
    """Options that make an interrupted training go on, and evaluate at its end."""
    last = last_checkpoint(folder)
    if last is None:
        return ['--overwrite']
    if last.name != f'iter_{iters}.pth' or evaluations(read_scalars(folder)):
        return ['--resume']
    # Killed between the last iteration and its evaluation: the last checkpoint trains nothing
    # more, so nothing would be evaluated.
    before = [path for path in saved_checkpoints(folder) if path.name != last.name]
    return ['--resume', str(before[-1])] if before else ['--overwrite']
