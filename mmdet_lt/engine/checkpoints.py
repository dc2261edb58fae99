"""Look at a checkpoint before a run starts, so that a bad one is refused in a sentence."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from mmdet_lt.engine.compat import allow_mmengine_checkpoints
from mmdet_lt.errors import InputError

# What Runner.resume reads without asking whether it is there.
_RESUME_KEYS = ('meta', 'message_hub', 'state_dict')


def is_remote(path: str | os.PathLike) -> bool:
    """Whether mmengine fetches this checkpoint by a scheme (``https://``, ``torchvision://``)."""
    return re.match(r'[A-Za-z][\w+.-]+:', str(path)) is not None and not os.path.exists(path)


def check_checkpoint(path: str | os.PathLike, key: str, resume: bool = False) -> None:
    """Refuse a local checkpoint that is missing, truncated or of the wrong kind.

    Args:
        path: The checkpoint; a remote address is left to mmengine.
        key: Where the user gave it, named in the error (``--resume``, ``load_from``).
        resume: The checkpoint must also hold the training state.

    Raises:
        InputError: The checkpoint cannot be used.
    """
    if is_remote(path):
        return
    content = read_checkpoint(path, key)
    if content is None:
        return
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise InputError(f'checkpoint {path} ({key}) should hold a dict, found {kind}.')
    missing = [name for name in _RESUME_KEYS if name not in content]
    if resume and missing:
        raise InputError(
            f'checkpoint {path} ({key}) has no `{missing[0]}`, so it holds weights and not the '
            'state of a training run; start a new run from its weights with '
            f'--cfg-options load_from={path}.'
        )


def read_checkpoint(path: str | os.PathLike, key: str) -> Any:
    """Read a local checkpoint with torch's safe loader; tensors stay in the file where possible.

    Returns:
        The content, or None if the file looks whole but this loader cannot rebuild it: below
        torch 2.6, or when it holds objects outside the allow-list. mmengine then decides.

    Raises:
        InputError: The file is missing, not a checkpoint, or truncated.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        found = 'a folder' if path.is_dir() else 'nothing'
        raise InputError(f'checkpoint {path} ({key}) expected, found {found} there.')
    size = path.stat().st_size
    broken = InputError(
        f'checkpoint {path} ({key}, {size} bytes) is truncated or not a checkpoint of torch; '
        'restore the file or name another one.'
    )
    with open(path, 'rb') as file:
        is_archive = file.read(4) == b'PK\x03\x04'
    if not size or (is_archive and not zipfile.is_zipfile(path)):
        raise broken
    if not allow_mmengine_checkpoints():
        return None
    try:
        # Mapping the file leaves the weights on disk: large checkpoints are looked at in no time.
        return torch.load(path, map_location='cpu', weights_only=True, mmap=is_archive or None)
    except pickle.UnpicklingError as error:
        if 'GLOBAL' in str(error) or 'allowlisted' in str(error):
            return None
        raise broken from error
    except Exception as error:  # bytes that are no pickle fail in every possible way
        raise broken from error


def config_text(path: str | os.PathLike) -> str | None:
    """The config that mmengine stored in a checkpoint, or None if there is none to be read."""
    try:
        content = read_checkpoint(path, 'last_checkpoint')
    except InputError:
        return None
    meta = content.get('meta') if isinstance(content, dict) else None
    text = meta.get('cfg') if isinstance(meta, dict) else None
    return text if isinstance(text, str) else None
