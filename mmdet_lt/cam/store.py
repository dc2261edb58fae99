"""The CAM file: one foreground mask for each annotation id, found without reading the file.

Layout: one line of JSON (the header), then, each aligned to 8 bytes, the arrays of ``_COLUMNS``
sorted by annotation id, then the run-length codes one after another. The file is mapped into
memory: opening LVIS' 1.27 million masks reads the header and nothing else, and processes share it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_lt.cam.masks import decode
from mmdet_lt.errors import InputError

FORMAT = 'mmdet_lt.cams.v1'
_COLUMNS = (('id', np.int64), ('start', np.int64), ('size', np.int32), ('height', np.int32))
_COLUMNS += (('width', np.int32),)
#: One mask: annotation id, height, width, run-length code.
Entry = tuple[int, int, int, bytes]


class CAMFile:
    """Foreground masks by annotation id.

    Args:
        path: File written by ``tools/cam/extract_cams.py``.
        key: Config key to name in errors.

    Raises:
        InputError: The file is missing, cut off or no CAM file.
    """

    def __init__(self, path: str | os.PathLike, key: str = 'cams') -> None:
        self.path = Path(path)
        if not self.path.is_file():
            found = 'a folder' if self.path.is_dir() else 'nothing'
            raise InputError(
                f'CAM file {path} expected, found {found} there: correct `{key}`, or make the file '
                'with tools/cam/extract_cams.py.'
            )
        with open(self.path, 'rb') as file:
            line = file.readline(1 << 24)
        try:
            self.header: dict[str, Any] = json.loads(line)
            known = self.header.get('format') == FORMAT
        except (ValueError, AttributeError):
            known = False
        if not known:
            raise InputError(f'{path} is no CAM file of format {FORMAT}: correct `{key}`.')
        count, position = self.header['count'], _aligned(len(line))
        expected = _size(len(line), count, self.header['bytes'])
        if self.path.stat().st_size != expected:
            raise InputError(
                f'CAM file {path} should have {expected} bytes, found '
                f'{self.path.stat().st_size}: restore it, or extract again.'
            )
        self._columns = {}
        for name, kind in _COLUMNS:
            self._columns[name] = self._map(kind, position, count)
            position = _aligned(position + count * np.dtype(kind).itemsize)
        self._codes = self._map(np.uint8, position, self.header['bytes'])

    def _map(self, kind: Any, position: int, count: int) -> np.ndarray:
        if count == 0:  # an empty range cannot be mapped
            return np.empty(0, dtype=kind)
        return np.memmap(self.path, dtype=kind, mode='r', offset=position, shape=(count,))

    def __len__(self) -> int:
        return len(self._columns['id'])

    @property
    def ids(self) -> np.ndarray:
        """Annotation ids in ascending order, int64."""
        return self._columns['id']

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the detector, in label order."""
        return tuple(self.header['classes'])

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Which annotation ids have a mask, bool."""
        if len(self) == 0:
            return np.zeros(len(ids), dtype=bool)
        row = np.minimum(np.searchsorted(self.ids, ids), len(self) - 1)
        return np.asarray(self.ids[row] == ids)

    def code(self, annotation_id: int) -> tuple[int, int, bytes]:
        """Height, width and run-length code of one mask.

        Raises:
            KeyError: There is no mask for this annotation.
        """
        row = int(np.searchsorted(self.ids, annotation_id))
        if row == len(self) or self.ids[row] != annotation_id:
            raise KeyError(annotation_id)
        start, size, height, width = (int(self._columns[k][row]) for k, _ in _COLUMNS[1:])
        return height, width, self._codes[start : start + size].tobytes()

    def mask(self, annotation_id: int) -> np.ndarray:
        """Foreground in the window of the object's box, bool (height, width)."""
        height, width, counts = self.code(annotation_id)
        return decode(counts, height, width)


def write_cams(
    path: str | os.PathLike, header: Mapping[str, Any], entries: Iterable[Entry]
) -> None:
    """Write a CAM file; readers and crashes never see half of it.

    The codes are streamed to disk, only the arrays (40 bytes a mask) are held.

    Args:
        path: The file.
        header: Plain values; ``format``, ``count`` and ``bytes`` are added.
        entries: One for each annotation, in any order.

    Raises:
        InputError: Two entries have one id.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: array('q') for name, _ in _COLUMNS}
    with tempfile.TemporaryFile(dir=path.parent) as codes:
        position = 0
        for annotation_id, height, width, counts in entries:
            row = (annotation_id, position, len(counts), height, width)
            for (name, _), value in zip(_COLUMNS, row, strict=True):
                columns[name].append(value)
            codes.write(counts)
            position += len(counts)
        codes.seek(0)
        _write(path, dict(header), columns, codes, position)


def _write(path: Path, header: dict, columns: dict[str, array], codes: Any, size: int) -> None:
    ids = np.asarray(columns['id'], dtype=np.int64)
    order = np.argsort(ids, kind='stable')
    twice = np.flatnonzero(np.diff(ids[order]) == 0)
    if len(twice):
        raise InputError(
            f'annotation id {ids[order][twice[0]]} occurs twice: give each annotation of the file '
            'an `id` of its own.'
        )
    header = dict(header, format=FORMAT, count=len(ids), bytes=size)
    unfinished = path.with_name(path.name + '.tmp')
    try:
        with open(unfinished, 'wb') as file:
            file.write(json.dumps(header, sort_keys=True).encode() + b'\n')
            for column, kind in _COLUMNS:
                file.write(b'\0' * (_aligned(file.tell()) - file.tell()))
                file.write(np.asarray(columns[column], dtype=kind)[order].tobytes())
            file.write(b'\0' * (_aligned(file.tell()) - file.tell()))
            shutil.copyfileobj(codes, file, 1 << 22)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _aligned(position: int) -> int:
    return -(-position // 8) * 8


def _size(header: int, count: int, codes: int) -> int:
    position = _aligned(header)
    for _, kind in _COLUMNS:
        position = _aligned(position + count * np.dtype(kind).itemsize)
    return position + codes
