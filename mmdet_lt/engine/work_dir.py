"""Protect the results of an earlier run: refuse to mix two runs in one work directory."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from mmdet_lt.engine.checkpoints import check_checkpoint, config_text, is_remote
from mmdet_lt.engine.config_diff import describe, differences, is_harmful, parse_dumped
from mmdet_lt.errors import InputError


def saved_checkpoints(work_dir: str | os.PathLike) -> list[Path]:
    """Checkpoints directly in a work directory, newest last."""
    found = [path for path in Path(work_dir).glob('*.pth') if path.is_file()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def last_checkpoint(work_dir: str | os.PathLike) -> Path | None:
    """The checkpoint that ``last_checkpoint`` of a work directory names, None without that file.

    mmengine notes an absolute path; after the directory was moved the file is looked for beside
    the note. A run that was killed while it wrote the note leaves it empty: then the newest
    checkpoint counts, which was complete before the note was begun. The path returned need not
    exist.
    """
    note = Path(work_dir) / 'last_checkpoint'
    if not note.is_file():
        return None
    text = note.read_text(encoding='utf-8').strip()
    if not text:
        saved = saved_checkpoints(work_dir)
        return saved[-1] if saved else None
    noted = Path(text)
    moved = note.parent / noted.name
    return moved if not noted.is_file() and moved.is_file() else noted


def earlier_config(work_dir: str | os.PathLike) -> dict[str, Any] | None:
    """Config of the run whose results lie in a work directory, None if it cannot be told.

    The checkpoint is asked first: the file beside it is overwritten by every start, also by a test
    run that changes the model for test-time augmentation.
    """
    texts = []
    saved = saved_checkpoints(work_dir)
    for path in (last_checkpoint(work_dir), saved[-1] if saved else None):
        if path is not None and path.is_file():
            texts.append(config_text(path))
            break
    dumped = sorted(Path(work_dir).glob('*.py'), key=lambda path: path.stat().st_mtime_ns)
    texts += [path.read_text(encoding='utf-8') for path in reversed(dumped)]
    for text in texts:
        try:
            config = parse_dumped(text or '')
        except (SyntaxError, ValueError):
            continue
        if 'model' in config:
            return config
    return None


def check_new_run(work_dir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Refuse to start from scratch where an earlier run left checkpoints.

    Args:
        work_dir: Work directory of the run to start.
        config: Its config.

    Raises:
        InputError: There is something to lose.
    """
    if Path(work_dir).exists() and not Path(work_dir).is_dir():
        raise InputError(f'work directory {work_dir} expected, found a file there.')
    saved = saved_checkpoints(work_dir)
    if not saved and last_checkpoint(work_dir) is None:
        return
    old = earlier_config(work_dir)
    changed = differences(old, config) if old is not None else {}
    if changed:
        key = _most_telling(changed)
        whose = f'of a run with another config ({describe(key, changed[key])})'
        advice = 'give another --work-dir'
    else:
        whose = 'of an earlier run' + (' with the same config' if old is not None else '')
        advice = 'give --resume to continue it, or another --work-dir'
    what = saved[-1].name if saved else 'last_checkpoint'
    raise InputError(
        f'work directory {work_dir} holds checkpoints {whose}, {what} being the newest, which a '
        f'run from scratch would overwrite: {advice}, or delete the directory, or give --overwrite.'
    )


def forget_earlier_run(work_dir: str | os.PathLike) -> None:
    """Remove the note of the last checkpoint, so that ``--resume`` cannot pick up a replaced run.

    Checkpoints stay until the new run writes files of the same name.
    """
    (Path(work_dir) / 'last_checkpoint').unlink(missing_ok=True)


def find_resume(resume: str, work_dir: str | os.PathLike, config: Mapping[str, Any]) -> str | None:
    """Choose the checkpoint to continue from and check that the config still fits it.

    Args:
        resume: A checkpoint, or ``auto`` for the last one in ``work_dir``.
        work_dir: Work directory of the run.
        config: Config of the run.

    Returns:
        The checkpoint, or None if ``auto`` found an untouched work directory.

    Raises:
        InputError: The checkpoint is missing or broken, or was trained with another model or other
            classes.
    """
    path: str | os.PathLike | None = resume
    if resume == 'auto':
        path = last_checkpoint(work_dir)
        if path is None:
            saved = saved_checkpoints(work_dir)
            if saved:
                raise InputError(
                    f'work directory {work_dir} has no file last_checkpoint, but {saved[-1].name}: '
                    f'name the checkpoint, --resume {saved[-1]}, or start again with --overwrite.'
                )
            print_log(f'No checkpoint in {work_dir}: training starts from scratch.', 'current')
            return None
    assert path is not None
    check_checkpoint(path, '--resume', resume=True)
    if not is_remote(path):
        _compare(f'checkpoint {path}', _config_of(path), config)
    if saved_checkpoints(work_dir):
        _compare(f'work directory {work_dir}', earlier_config(work_dir), config, quiet=True)
    return str(path)


def _config_of(path: str | os.PathLike) -> dict[str, Any] | None:
    text = config_text(path)
    if text is None:
        return earlier_config(Path(path).parent)
    try:
        return parse_dumped(text)
    except (SyntaxError, ValueError):
        return None


def _compare(
    where: str, old: Mapping[str, Any] | None, new: Mapping[str, Any], quiet: bool = False
) -> None:
    if old is None:
        return
    changed = differences(old, new)
    key = _most_telling(changed) if changed else ''
    if is_harmful(key):
        raise InputError(
            f'cannot resume: {where} belongs to a run with another model or other classes, '
            f'{describe(key, changed[key])}; restore the key, or start a new run in another '
            '--work-dir (weights can be used there with --cfg-options load_from=CHECKPOINT).'
        )
    if changed and not quiet:
        clauses = [describe(key, pair) for key, pair in list(changed.items())[:5]]
        more = f' and {len(changed) - 5} more' if len(changed) > 5 else ''
        print_log(
            f'The config changed since {where} was written: {"; ".join(clauses)}{more}.',
            'current',
            level=logging.WARNING,
        )


def _most_telling(changed: Mapping[str, Any]) -> str:
    """The first harmful key, the outer ones first: ``model.type`` before what it brings along."""
    return min(changed, key=lambda key: (not is_harmful(key), key.count('.'), key))
