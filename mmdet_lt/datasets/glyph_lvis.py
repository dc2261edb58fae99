"""Glyph-LVIS: a long-tailed instance segmentation data set that is drawn, not downloaded.

Each image shows glyphs of the DejaVu fonts inside matplotlib in random face, size, rotation,
colour and blur on a random background. A class is a character. The annotation files are in LVIS v1
format with federated labels: ``image_count``, ``instance_count`` and ``frequency`` per class,
``neg_category_ids`` and ``not_exhaustive_category_ids`` per image, run-length masks.

Presets:

* ``mini``: 40 easily told apart classes (12 rare, 14 common, 14 frequent), 2,000 + 400 images of
  128 × 128 pixels. Its gap between frequent and rare classes comes from their counts.
* ``full``: 1,203 classes with LVIS v1's counts (337 rare, 461 common, 405 frequent; in 1 to 1,977
  training images), 40,000 + 6,000 images of 256 × 256 pixels. With that many characters some look
  much alike, as fine-grained classes do in LVIS.

Use ``data_root=<folder>``, ``ann_file='annotations/glyph_lvis_train.json'`` and
``data_prefix=dict(img='')`` in a data set config.
"""

from __future__ import annotations

import errno
import logging
import operator
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmdet_lt.datasets import _glyph_store as store
from mmdet_lt.datasets._glyph_annotations import write_annotations
from mmdet_lt.datasets._glyph_plan import SPLITS, GlyphPlan, make_plan, plan_class_counts
from mmdet_lt.datasets._glyph_preset import PRESETS, GlyphPreset
from mmdet_lt.datasets._glyph_render import render_image
from mmdet_lt.datasets._glyph_workers import Job, Shard, draw_shards
from mmdet_lt.errors import InputError

__all__ = [
    'PRESETS',
    'GlyphPreset',
    'generate_glyph_lvis',
    'plan_class_counts',
    'verify_glyph_lvis',
]

_SHARD_IMAGES = 50
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Workers of a run that was killed a moment ago need a second to notice; seconds.
_LOCK_PATIENCE = 4.0
_logger = logging.getLogger(__name__)


def generate_glyph_lvis(
    preset: str | GlyphPreset,
    out_dir: str | os.PathLike,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Make a Glyph-LVIS data set, or verify and reuse the one that is there.

    The content depends on the preset, the seed and the library versions in the manifest, not on
    the number of workers. An interrupted run continues where it stopped; damaged files of the
    same data set are made again; nothing else in the folder is ever touched.

    Args:
        preset: ``'mini'``, ``'full'`` or parameters of your own.
        out_dir: Folder of the data set; new, empty or made earlier with this preset and seed.
        seed: Whole number of at least 0.
        workers: Number of drawing processes; None uses every CPU core.
        progress: Show progress bars with the remaining time on stderr.

    Returns:
        The folder.

    Raises:
        InputError: An argument is wrong, the folder holds something else, or the disk is full or
            not writable. What was finished before stays for the next run.
    """
    preset = _resolve_preset(preset)
    seed = _whole_number('seed', seed, 0)
    workers = _whole_number('workers', workers, 1) if workers is not None else os.cpu_count() or 1
    out = Path(out_dir)
    with _errors_explained(out, preset):
        state = _folder_state(out, preset, seed)
        if state == 'complete':
            problems = _problems(out, progress)
            if not problems:
                _logger.info('%s: verified, nothing to do', out)
                return out
            count, first = len(problems), problems[0][1]
            _logger.warning('%s: %d damaged file(s) are made again: %s', out, count, first)
            if _repair(out, preset, seed, [name for name, _ in problems]):
                return out
        _build(out, preset, seed, workers, progress, resume=state == 'unfinished')
    return out


def verify_glyph_lvis(out_dir: str | os.PathLike) -> list[str]:
    """Compare every file of a data set with the sizes and checksums in its manifest.

    Returns:
        One sentence per problem; empty for a complete and undamaged data set.
    """
    return [sentence for _, sentence in _problems(Path(out_dir), progress=False)]


def _resolve_preset(preset: str | GlyphPreset) -> GlyphPreset:
    if isinstance(preset, GlyphPreset):
        return preset
    if not isinstance(preset, str) or preset not in PRESETS:
        names = ' or '.join(repr(name) for name in PRESETS)
        raise InputError(f'preset: expected {names}, found {preset!r}; nothing was written.')
    return PRESETS[preset]


def _whole_number(key: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < least:
        raise InputError(
            f'{key}: expected a whole number of at least {least}, found {value!r}; nothing was '
            'written.'
        )
    return number


def _folder_state(out: Path, preset: GlyphPreset, seed: int) -> str:
    """'new', 'complete', 'unfinished', or 'lost' when only the manifest of ours is gone.

    Raises:
        InputError: The folder holds anything but this data set.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f'{out}: expected a folder, found a file; choose another --out.')
    if not out.is_dir():
        return 'new'
    manifest = store.read_manifest(out)
    if manifest is not None:
        _check_identity(out, manifest, preset, seed)
        return 'complete' if manifest.get('complete') is True else 'unfinished'
    # A run killed before its first manifest leaves at most the temporary one.
    if {entry.name for entry in out.iterdir()} <= {store.MANIFEST + '.tmp'}:
        return 'new'
    try:
        with open(out / store.CHECKSUMS, encoding='utf-8') as file:
            if file.readline().rstrip('\n') == store.checksum_header(preset.name, seed):
                return 'lost'
    except (OSError, UnicodeDecodeError):
        pass
    raise InputError(
        f'{out}: expected a new or empty folder or Glyph-LVIS {preset.name} with seed {seed}, '
        f'found other files and no valid {store.MANIFEST}; choose another --out, nothing was '
        'changed.'
    )


def _check_identity(out: Path, manifest: dict[str, Any], preset: GlyphPreset, seed: int) -> None:
    expected = store.identity(preset, seed)
    if all(manifest.get(key) == value for key, value in expected.items()):
        return
    where = f'{out / store.MANIFEST}: '
    advice = '; choose another --out, nothing was changed.'
    for key in ('preset', 'seed', 'format_version'):
        if manifest.get(key) != expected[key]:
            raise InputError(
                f'{where}`{key}`: expected {expected[key]!r}, found {manifest.get(key)!r} (the '
                f'folder holds Glyph-LVIS preset {manifest.get("preset")}, seed '
                f'{manifest.get("seed")}){advice}'
            )
    found = manifest.get('parameters')
    found = found if isinstance(found, dict) else {}
    wanted = expected['parameters']
    key = next(k for k in [*wanted, *found] if wanted.get(k) != found.get(k))
    raise InputError(
        f'{where}`parameters.{key}`: expected {wanted.get(key)!r}, found {found.get(key)!r}{advice}'
    )


def _problems(out: Path, progress: bool) -> list[tuple[str, str]]:
    """(file, sentence) of everything that differs from the manifest."""
    manifest = store.read_manifest(out)
    if manifest is None:
        return [(store.MANIFEST, f'{store.MANIFEST}: expected a manifest, found none')]
    if manifest.get('complete') is not True:
        return [(store.MANIFEST, f'{store.MANIFEST}: the data set is not finished')]
    problems = []
    files = manifest.get('files')
    names = [store.annotation_name(split) for split in SPLITS] + [store.CHECKSUMS]
    for name in names:
        record = files.get(name) if isinstance(files, dict) else None
        record = record if isinstance(record, dict) else {}
        if sentence := store.file_problem(out, name, record):
            problems.append((name, sentence))
    if any(name == store.CHECKSUMS for name, _ in problems):
        return problems
    rows = list(store.read_checksums(out))
    for name, size, crc in tqdm(rows, 'verifying', unit='img', disable=not progress):
        if sentence := store.image_problem(out, name, size, crc):
            problems.append((name, sentence))
    return problems


def _repair(out: Path, preset: GlyphPreset, seed: int, names: list[str]) -> bool:
    """Draw damaged images again in place.

    Returns:
        False when more than images is damaged, or when these libraries draw other bits than the
        ones that made the data set; then all of it has to be made again.
    """
    sums = {} if store.CHECKSUMS in names else {n: rest for n, *rest in store.read_checksums(out)}
    if not set(names) <= set(sums):
        return False
    plan = make_plan(preset, seed)
    with _locked(out):
        manifest = store.read_manifest(out)
        store.write_manifest(out, manifest, complete=False)
        for name in names:
            split, image_id = Path(name).parent.name, int(Path(name).stem)
            store.write_image(out / name, render_image(preset, plan, seed, split, image_id).png)
            if store.image_problem(out, name, *sums[name]) is not None:
                return False
        shutil.rmtree(out / store.WORK)
        store.write_manifest(out, manifest, complete=True)
    return True


def _build(
    out: Path, preset: GlyphPreset, seed: int, workers: int, progress: bool, resume: bool
) -> None:
    """Draw what is missing, write the tables and finish the manifest."""
    plan = make_plan(preset, seed)
    old = store.read_manifest(out)
    manifest = {
        **store.identity(preset, seed),
        'characters': [f'U+{ord(c):04X}' for c in plan.characters],
        'versions': store.library_versions(),
    }
    # Shards drawn by other libraries would mix two versions of the data set.
    resume = resume and old is not None and old.get('versions') == manifest['versions']
    shards = [
        (split, first, min(first + _SHARD_IMAGES - 1, count))
        for split, count in preset.num_images.items()
        for first in range(1, count + 1, _SHARD_IMAGES)
    ]
    todo = [s for s in shards if not (resume and store.shard_is_valid(out, *s))]
    _check_disk(out, preset, todo)
    if not resume:
        for record in (out / store.WORK).glob('*.jsonl'):
            record.unlink()
    _claim(out, manifest)
    with _locked(out):
        for split in SPLITS:
            (out / split).mkdir(exist_ok=True)
        count = sum(preset.num_images.values())
        done = count - sum(last - first + 1 for _, first, last in todo)
        bar = tqdm(
            total=count, initial=done, desc='drawing', unit='img', smoothing=0, disable=not progress
        )
        with bar:
            draw_shards(Job(out, preset, plan, seed), todo, workers, bar.update)
        manifest['files'] = _write_tables(out, preset, plan, seed, shards, progress)
        shutil.rmtree(out / store.WORK)
        store.write_manifest(out, manifest, complete=True)


def _write_tables(
    out: Path,
    preset: GlyphPreset,
    plan: GlyphPlan,
    seed: int,
    shards: list[Shard],
    progress: bool,
) -> dict[str, Any]:
    """Annotation files and checksums from the records of the shards; their manifest entries."""
    paths = {
        split: [store.shard_path(out, s, first) for s, first, _ in shards if s == split]
        for split in SPLITS
    }
    # In this order: the validation file quotes the class counts of the training file.
    for split in tqdm(SPLITS, 'annotations', unit='file', disable=not progress):
        images = write_annotations(out, preset, seed, plan, split, paths[split])
        if (images != plan.counts[split]).any():
            raise RuntimeError(f'{out}: the {split} images do not show the planned classes.')
    store.write_checksums(out, preset.name, seed, paths)
    names = [store.annotation_name(split) for split in SPLITS] + [store.CHECKSUMS]
    return {name: store.file_record(out / name) for name in names}


def _claim(out: Path, manifest: dict[str, Any]) -> None:
    """Make the folder and mark it as an unfinished data set of ours before anything else."""
    existed = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    try:
        store.write_manifest(out, manifest, complete=False)
    except OSError:
        if not existed:
            out.rmdir()
        raise


def _check_disk(out: Path, preset: GlyphPreset, todo: list[Shard]) -> None:
    """Refuse before anything is written when the disk is too small."""
    needed = 0
    for split, first, last in todo:
        for image_id in range(first, last + 1):
            path = out / store.image_name(split, image_id)
            needed += preset.bytes_per_image - (path.stat().st_size if path.is_file() else 0)
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    free = usage.free
    # File systems without a size (/proc, some network drives) cannot be judged up front.
    if usage.total and free < needed:
        raise InputError(
            f'{out}: expected about {_megabytes(needed)} of free disk space for preset '
            f'{preset.name!r}, found {_megabytes(free)}; free some space or choose another --out, '
            'nothing was written.'
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second process from making the same data set at the same time."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder write the same bits, only twice.
        fcntl = None
    (out / store.WORK).mkdir(exist_ok=True)
    with open(out / store.WORK / 'lock', 'w') as file:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f'{out}: expected no other run in this folder, found one that holds '
                        f'{store.WORK}/lock; wait for it to end.'
                    ) from None
                time.sleep(0.1)
        yield


@contextmanager
def _errors_explained(out: Path, preset: GlyphPreset) -> Iterator[None]:
    """Turn errors of the operating system into one sentence that says what to do."""
    try:
        yield
    except BrokenProcessPool as error:
        raise InputError(
            f'{out}: expected every drawing process to finish, found one killed (often for lack '
            'of memory); run the same command again with fewer --workers, it continues.'
        ) from error
    except OSError as error:
        place = error.filename or out
        if error.errno in _FULL_DISK:
            total = preset.bytes_per_image * sum(preset.num_images.values())
            try:
                free = _megabytes(shutil.disk_usage(out).free)
            except OSError:
                free = 'an unknown amount'
            raise InputError(
                f'{place}: the disk is full: expected about {_megabytes(total)} for the whole '
                f'data set, found {free} free; free some space and run the same command again, '
                f'it continues, or delete the unfinished {out}.'
            ) from error
        raise InputError(
            f'{place}: expected a writable folder at {out}, found "{error.strerror or error}"; '
            'choose another --out or correct its permissions.'
        ) from error


def _megabytes(size: int) -> str:
    return f'{max(size, 0) / 1e6:,.1f} MB'
