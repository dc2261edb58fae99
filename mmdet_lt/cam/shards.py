"""Parts of an unfinished extraction: one file for each rank, one line for each finished chunk.

A *chunk* is a fixed run of images, whatever the number of ranks, so an extraction may be killed
and continued with more or fewer ranks; the result is the same file.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdet_lt.cam.store import Entry
from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import write_text_atomic


class Shards:
    """The folder ``<out>.parts``.

    Args:
        out: The CAM file to be.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out.with_name(out.name + '.parts')
        self._file: Any = None

    def prepare(self, header: Mapping[str, Any]) -> dict[int, tuple[Path, int]]:
        """Open the folder and find what is done already. For one process only.

        A line that was cut off by a kill is removed.

        Returns:
            File and position of each finished chunk.

        Raises:
            InputError: The folder holds parts of another extraction.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        note = self.folder / 'header.json'
        if note.is_file():
            earlier = json.loads(note.read_text(encoding='utf-8'))
            odd = [key for key in header if earlier.get(key) != header[key]]
            if odd:
                raise InputError(
                    f'{self.folder} holds parts of another extraction ({odd[0]} was '
                    f'{_short(earlier.get(odd[0]))} and is now {_short(header[odd[0]])}): remove '
                    'the folder or choose another --out.'
                )
        else:
            write_text_atomic(note, json.dumps(header))
        done: dict[int, tuple[Path, int]] = {}
        for path in sorted(self.folder.glob('rank-*.jsonl')):
            done.update(_finished(path))
        return done

    def append(self, rank: int, chunk: int, entries: list[Entry], flat: int) -> None:
        """Store one finished chunk; it survives a kill from here on.

        Args:
            rank: Names the file.
            chunk: Number of the chunk.
            entries: Its masks.
            flat: How many of them come from flat maps.
        """
        if self._file is None:
            self._file = open(self.folder / f'rank-{rank:04d}.jsonl', 'ab')
        coded = [[i, h, w, base64.b85encode(counts).decode()] for i, h, w, counts in entries]
        line = json.dumps(dict(chunk=chunk, flat=flat, cams=coded), separators=(',', ':'))
        self._file.write(line.encode() + b'\n')
        self._file.flush()

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def chunks(self, done: Mapping[int, tuple[Path, int]]) -> Iterator[tuple[list[Entry], int]]:
        """Masks and number of flat maps of each chunk in order, one chunk in memory at a time."""
        files = {path: open(path, 'rb') for path in {path for path, _ in done.values()}}
        try:
            for chunk in sorted(done):
                path, position = done[chunk]
                files[path].seek(position)
                line = json.loads(files[path].readline())
                coded = line['cams']
                yield [(i, h, w, base64.b85decode(c)) for i, h, w, c in coded], line['flat']
        finally:
            for file in files.values():
                file.close()

    def remove(self) -> None:
        """Delete the parts once the CAM file is written."""
        shutil.rmtree(self.folder)


def _finished(path: Path) -> Iterator[tuple[int, tuple[Path, int]]]:
    with open(path, 'r+b') as file:
        position = 0
        for line in iter(file.readline, b''):
            try:
                chunk = json.loads(line)['chunk'] if line.endswith(b'\n') else None
            except ValueError:
                chunk = None
            if chunk is None:
                file.truncate(position)
                return
            yield chunk, (path, position)
            position += len(line)


def _short(value: Any, limit: int = 60) -> str:
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + '...'
