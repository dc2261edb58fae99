"""Read annotation files with errors a user can act on, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mmdet_lt.errors import InputError


def cache_dir() -> Path:
    """Folder for derived data: ``$MMDET_LT_CACHE``, else the user's cache folder."""
    root = os.environ.get('MMDET_LT_CACHE')
    if root:
        return Path(root)
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmdet_lt'


def read_json(path: str | os.PathLike, key: str = 'ann_file', what: str = 'annotation file') -> Any:
    """Parse a JSON file.

    Args:
        path: The file.
        key: Config key a user changes when the file is wrong; named in the error.
        what: What the file should be; named in the error.

    Raises:
        InputError: The file is missing, unreadable, empty or truncated.
    """
    path = Path(path)
    if not path.is_file():
        found = 'a folder' if path.is_dir() else 'nothing'
        raise InputError(f'{what} {path} expected, found {found} there: correct `{key}`.')
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        size = path.stat().st_size
        where = f'at character {error.pos}' if hasattr(error, 'pos') else 'as text'
        raise InputError(
            f'{what} {path} ({size} bytes) is not complete JSON: reading stopped {where}; restore '
            f'the file or correct `{key}`.'
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f'{what} {path} cannot be read ({reason}): correct `{key}`.') from error


def file_digest(path: str | os.PathLike) -> str:
    """Blake2b digest of a file's content (about 1 GB/s), 32 hexadecimal characters."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, 'rb') as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write ``text`` so that readers and crashes never see half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix='.tmp')
    try:
        with os.fdopen(handle, 'w', encoding='utf-8') as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
