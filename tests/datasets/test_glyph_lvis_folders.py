"""Glyph-LVIS folders: reuse, damage, refusal, full disks, interruption, and the tool."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from glyph_toy import TINY, make, times, tree

from mmdet_lt.datasets import _glyph_store as store
from mmdet_lt.datasets import _glyph_workers, glyph_lvis
from mmdet_lt.datasets.glyph_lvis import verify_glyph_lvis
from mmdet_lt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'dataset' / 'make_glyph_lvis.py'


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp('glyph') / 'data')


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / 'copy'))


# --------------------------------------------------------------------------- reuse, damage, refusal


def test_finished_folder_is_reused(copy):
    before = times(copy)
    assert verify_glyph_lvis(copy) == []
    assert make(copy) == copy
    assert times(copy) == before


def damage_image(out: Path) -> str:
    path = out / 'train' / '000000000005.png'
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    return 'train/000000000005.png: expected CRC-32'


def lose_image(out: Path) -> str:
    (out / 'val' / '000000000002.png').unlink()
    return 'val/000000000002.png: expected an image'


def cut_annotations(out: Path) -> str:
    path = out / store.annotation_name('val')
    path.write_bytes(path.read_bytes()[:-20])
    return 'glyph_lvis_val.json: expected bytes'


def cut_checksums(out: Path) -> str:
    path = out / 'checksums.txt'
    path.write_bytes(path.read_bytes()[:-20])
    return 'checksums.txt: expected bytes'


def cut_manifest(out: Path) -> str:
    path = out / 'glyph_lvis.json'
    path.write_bytes(path.read_bytes()[:-20])
    return 'expected a manifest'


@pytest.mark.parametrize(
    'damage', [damage_image, lose_image, cut_annotations, cut_checksums, cut_manifest]
)
def test_damage_is_found_and_made_good(finished, copy, damage):
    expected = damage(copy)
    problems = verify_glyph_lvis(copy)
    assert len(problems) == 1
    assert expected in problems[0]
    make(copy)
    assert verify_glyph_lvis(copy) == []
    assert tree(copy) == tree(finished)


def test_repair_redraws_only_the_damaged_image(copy):
    damage_image(copy)
    before = times(copy / 'train')
    make(copy)
    after = times(copy / 'train')
    changed = [Path(k).name for k in before if before[k] != after[k]]
    assert changed == ['000000000005.png']


def test_other_files_in_the_folder_stay(copy):
    (copy / 'notes.txt').write_text('mine')
    cut_annotations(copy)
    make(copy)
    assert (copy / 'notes.txt').read_text() == 'mine'


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / '000000000001.png').write_bytes(b'holiday')
    (tmp_path / 'glyph_lvis.json').write_text('{"format": "something else"}')
    before = tree(tmp_path), times(tmp_path)
    with pytest.raises(InputError, match='found other files.*choose another --out') as error:
        make(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert (tree(tmp_path), times(tmp_path)) == before


@pytest.mark.parametrize(
    ('preset', 'seed', 'message'),
    [
        (TINY, 3, r'`seed`: expected 3, found 0 .*preset tiny, seed 0'),
        ('mini', 0, r"`preset`: expected 'mini', found 'tiny'"),
        (
            dataclasses.replace(TINY, max_rotation=5.0),
            0,
            '`parameters.max_rotation`: expected 5.0',
        ),
    ],
)
def test_another_data_set_of_ours_is_refused(finished, preset, seed, message):
    before = times(finished)
    with pytest.raises(InputError, match=message):
        make(finished, seed=seed, preset=preset)
    assert times(finished) == before


@pytest.mark.parametrize('seed', [-1, 1.5, True, '0', None])
def test_bad_seed(tmp_path, seed):
    with pytest.raises(InputError, match=f'seed: expected a whole number.*found {seed!r}'):
        make(tmp_path / 'new', seed=seed)
    assert not (tmp_path / 'new').exists()


def test_out_is_a_file_or_below_one(tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(InputError, match='expected a folder, found a file'):
        make(tmp_path / 'file')
    with pytest.raises(InputError, match='expected a writable folder'):
        make(tmp_path / 'file' / 'sub')
    assert (tmp_path / 'file').read_text() == 'x'


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write')
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InputError, match='expected a writable folder'):
            make(tmp_path / 'new')
    finally:
        tmp_path.chmod(0o755)


def test_unwritable_folder_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', str(tmp_path / 'new'))

    monkeypatch.setattr(store, 'write_manifest', refuse)
    with pytest.raises(InputError, match='expected a writable folder.*Permission denied'):
        make(tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


# -------------------------------------------------------------------------- full disk, interruption


def fail_after(monkeypatch, count: int, error: BaseException) -> None:
    real = store.write_image
    left = [count]

    def write(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise error
        real(path, data)

    monkeypatch.setattr(_glyph_workers, 'write_image', write)


@pytest.mark.parametrize('workers', [1, 2])
def test_full_disk_leaves_a_folder_that_continues(finished, tmp_path, monkeypatch, workers):
    out = tmp_path / 'new'
    with monkeypatch.context() as patch:
        fail_after(patch, 58, OSError(errno.ENOSPC, 'No space left on device', 'there.png'))
        with pytest.raises(InputError, match='there.png: the disk is full: expected about .* MB'):
            make(out, workers=workers)
    assert verify_glyph_lvis(out) == ['glyph_lvis.json: the data set is not finished']
    assert not (out / store.annotation_name('train')).exists()
    assert not list(out.rglob('*.tmp'))
    kept = times(out / 'train')
    done = [store.image_name('train', i) for i in range(1, 51)]

    make(out, workers=workers)
    assert tree(out) == tree(finished)
    if workers == 1:
        after = times(out / 'train')
        assert all(kept[str(out / name)] == after[str(out / name)] for name in done)


def test_interrupted_run_continues(finished, tmp_path, monkeypatch):
    out = tmp_path / 'new'
    with monkeypatch.context() as patch:
        fail_after(patch, 103, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make(out)
    assert verify_glyph_lvis(out)
    # An image of a finished shard that was damaged meanwhile is not taken over.
    (out / 'train' / '000000000007.png').write_bytes(b'')
    with pytest.raises(InputError, match='`seed`: expected 1, found 0'):
        make(out, seed=1)
    make(out)
    assert tree(out) == tree(finished)


def test_full_disk_while_writing_the_tables(finished, tmp_path, monkeypatch):
    out = tmp_path / 'new'

    def fsync(handle: int) -> None:
        if 'glyph_lvis_val' in os.readlink(f'/proc/self/fd/{handle}'):
            raise OSError(errno.ENOSPC, 'No space left on device')

    if not Path('/proc/self/fd').is_dir():
        pytest.skip('needs /proc')
    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fsync)
        with pytest.raises(InputError, match='the disk is full'):
            make(out)
    assert not (out / store.annotation_name('val')).exists()
    assert not list(out.rglob('*.tmp'))
    make(out)
    assert tree(out) == tree(finished)


def test_disk_too_small_is_noticed_up_front(tmp_path, monkeypatch):
    usage = types.SimpleNamespace(total=10**9, used=10**9 - 1000, free=1000)
    monkeypatch.setattr(glyph_lvis.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(InputError, match=r'expected about 1\.\d MB of free disk.*found 0.0 MB'):
        make(tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_file_system_without_a_size_is_not_judged(finished, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(total=0, used=0, free=0)
    monkeypatch.setattr(glyph_lvis.shutil, 'disk_usage', lambda path: usage)
    assert tree(make(tmp_path / 'new')) == tree(finished)


def test_shards_of_other_libraries_are_not_mixed_in(finished, tmp_path, monkeypatch):
    out = tmp_path / 'new'
    with monkeypatch.context() as patch:
        patch.setattr(store, 'library_versions', lambda: {'pillow': '0'})
        fail_after(patch, 58, OSError(errno.ENOSPC, 'No space left on device'))
        with pytest.raises(InputError):
            make(out)
    shard = store.shard_path(out, 'train', 1)
    record = shard.read_text()
    assert '"neg"' in record
    # Valid by its checksums, but wrong: it must be drawn again all the same.
    shard.write_text(record.replace('"neg":[', '"neg":[1,'))
    make(out)
    assert tree(out) == tree(finished)


@pytest.mark.skipif(sys.platform == 'win32', reason='no file locks')
def test_second_run_in_the_same_folder_is_refused(copy, monkeypatch):
    monkeypatch.setattr(glyph_lvis, '_LOCK_PATIENCE', 0.1)
    lose_image(copy)
    with glyph_lvis._locked(copy):
        with pytest.raises(InputError, match='expected no other run in this folder'):
            make(copy)


# -------------------------------------------------------------------------------------------- tool


def run_tool(*args: str) -> subprocess.CompletedProcess:
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, str(TOOL), *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_tool_refuses_an_unknown_preset(tmp_path):
    result = run_tool('--preset', 'huge', '--out', str(tmp_path / 'new'))
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: preset: expected 'mini' or 'full', found 'huge'")
    assert 'Traceback' not in result.stderr
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--seed', '-1'], 'error: seed: expected a whole number of at least 0, found -1'),
        (['--seed', 'x'], "error: argument --seed: invalid int value: 'x'"),
        (['--workers', '0'], 'error: workers: expected a whole number of at least 1, found 0'),
    ],
)
def test_tool_refuses_bad_numbers(tmp_path, capsys, args, message):
    import runpy

    tool = runpy.run_path(str(TOOL))
    try:
        status = tool['main'](['--preset', 'mini', '--out', str(tmp_path / 'new'), *args])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()
