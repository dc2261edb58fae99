"""Glyph-LVIS on disk: manifest, checksums, pieces of an unfinished run, annotation files.

Layout of a finished folder::

    glyph_lvis.json                      manifest; ``complete`` turns true as the very last step
    checksums.txt                        CRC-32, bytes and path of every image
    annotations/glyph_lvis_train.json    LVIS v1 format
    annotations/glyph_lvis_val.json
    train/000000000001.png ...
    val/000000000001.png ...

While it is being made there is also ``_in_progress/`` with one JSON-lines file per finished shard
of images; a later run takes such shards over after checking their images.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmdet_lt.datasets._glyph_plan import SPLITS
from mmdet_lt.datasets._glyph_preset import GlyphPreset
from mmdet_lt.datasets._glyph_render import RenderedImage

FORMAT = 'glyph_lvis'
FORMAT_VERSION = 1
MANIFEST = 'glyph_lvis.json'
CHECKSUMS = 'checksums.txt'
WORK = '_in_progress'
_TMP = '.tmp'


def image_name(split: str, image_id: int) -> str:
    """Path of an image relative to the data set's folder."""
    return f'{split}/{image_id:012d}.png'


def annotation_name(split: str) -> str:
    """Path of an annotation file relative to the data set's folder."""
    return f'annotations/glyph_lvis_{split}.json'


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[str]]:
    """Open a text file that appears under its name only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + _TMP)
    try:
        with open(temporary, 'w', encoding='utf-8', newline='\n') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_image(path: Path, data: bytes) -> None:
    """Write an image; a half-written file is removed again."""
    try:
        path.write_bytes(data)
    except BaseException:
        # A folder in the way is not ours to remove.
        if path.is_file():
            path.unlink()
        raise


def dump(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(',', ':'))


def identity(preset: GlyphPreset, seed: int) -> dict[str, Any]:
    """The part of a manifest that says which data set it is."""
    # Through JSON, so that tuples compare equal to the lists read back from a file.
    parameters = json.loads(json.dumps(asdict(preset)))
    return {
        'format': FORMAT,
        'format_version': FORMAT_VERSION,
        'preset': preset.name,
        'seed': seed,
        'parameters': parameters,
    }


def library_versions() -> dict[str, str]:
    """Versions of what decides pixels; other versions may give other bits for the same seed."""
    import matplotlib
    import PIL
    from PIL import features

    return {
        'pillow': PIL.__version__,
        'freetype': str(features.version('freetype2')),
        'zlib': str(features.version('zlib')),
        'matplotlib': matplotlib.__version__,
        'numpy': np.__version__,
        'unicode': unicodedata.unidata_version,
    }


def read_manifest(out: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None when there is none or it is not one of ours."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
        return None
    return manifest


def write_manifest(out: Path, content: dict[str, Any], complete: bool) -> None:
    """Write the manifest in one step; ``complete`` comes last in it."""
    with atomic_write(out / MANIFEST) as file:
        json.dump({**content, 'complete': complete}, file, indent=1)
        file.write('\n')


def checksum_header(preset_name: str, seed: int) -> str:
    """First line of the checksum file; tells whose folder it is when the manifest is lost."""
    return f'# {FORMAT} format_version={FORMAT_VERSION} preset={preset_name} seed={seed}'


def shard_path(out: Path, split: str, first: int) -> Path:
    """Where the record of the shard that starts with image ``first`` lies."""
    return out / WORK / f'{split}-{first:09d}.jsonl'


def image_record(image_id: int, image: RenderedImage) -> dict[str, Any]:
    """What the record of a shard keeps of an image."""
    return {
        'id': image_id,
        'bytes': len(image.png),
        'crc32': zlib.crc32(image.png),
        'neg': image.neg_category_ids,
        'not_exhaustive': image.not_exhaustive_category_ids,
        'annotations': image.annotations,
    }


def read_shard(path: Path) -> Iterator[dict[str, Any]]:
    """Records of the images of one shard, in order."""
    with open(path, encoding='utf-8') as file:
        for line in file:
            yield json.loads(line)


def read_shards(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Records of the images of several shards, in order; one is held in memory at a time."""
    for path in paths:
        yield from read_shard(path)


def shard_is_valid(out: Path, split: str, first: int, last: int) -> bool:
    """Whether a shard is recorded and its images on disk are the recorded ones."""
    try:
        records = list(read_shard(shard_path(out, split, first)))
        return [r['id'] for r in records] == list(range(first, last + 1)) and all(
            image_problem(out, image_name(split, r['id']), r['bytes'], r['crc32']) is None
            for r in records
        )
    except (OSError, ValueError, KeyError):
        return False


def write_checksums(out: Path, preset_name: str, seed: int, shards: dict[str, list[Path]]) -> None:
    """Write CRC-32, bytes and path of every image, one line each."""
    with atomic_write(out / CHECKSUMS) as file:
        file.write(checksum_header(preset_name, seed) + '\n')
        for split in SPLITS:
            for record in read_shards(shards[split]):
                name = image_name(split, record['id'])
                file.write(f'{record["crc32"]:08x} {record["bytes"]} {name}\n')


def read_checksums(out: Path) -> Iterator[tuple[str, int, int]]:
    """(path, bytes, CRC-32) of every image."""
    with open(out / CHECKSUMS, encoding='utf-8') as file:
        for line in file:
            if not line.startswith('#'):
                crc, size, name = line.split()
                yield name, int(size), int(crc, 16)


def file_record(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {'bytes': path.stat().st_size, 'sha256': digest.hexdigest()}


def file_problem(out: Path, name: str, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file of the manifest; None when it is as recorded."""
    try:
        found = file_record(out / name)
    except OSError as error:
        return f'{name}: expected a file, found none ({error.strerror})'
    for key in ('bytes', 'sha256'):
        if found[key] != expected.get(key):
            return f'{name}: expected {key} {expected.get(key)}, found {found[key]}'
    return None


def image_problem(out: Path, name: str, size: int, crc: int) -> str | None:
    """What is wrong with an image; None when it is as recorded."""
    try:
        data = (out / name).read_bytes()
    except OSError as error:
        return f'{name}: expected an image, found none ({error.strerror})'
    if len(data) != size:
        return f'{name}: expected {size} bytes, found {len(data)}'
    if zlib.crc32(data) != crc:
        return f'{name}: expected CRC-32 {crc:08x}, found {zlib.crc32(data):08x}'
    return None
