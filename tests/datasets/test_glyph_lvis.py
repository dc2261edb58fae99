"""Glyph-LVIS: what is drawn, what is written, and what happens to folders that are not as hoped."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from mmdet_lt.datasets import _glyph_store as store
from mmdet_lt.datasets import _glyph_workers, glyph_lvis
from mmdet_lt.datasets._glyph_plan import choose_characters, frequency_group, make_plan
from mmdet_lt.datasets._glyph_render import render_image
from mmdet_lt.datasets.glyph_lvis import (
    PRESETS,
    GlyphPreset,
    generate_glyph_lvis,
    plan_class_counts,
    verify_glyph_lvis,
)
from mmdet_lt.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'dataset' / 'make_glyph_lvis.py'
# Six classes of all three groups; several shards, so that two workers share the work.
TINY = GlyphPreset(
    name='tiny',
    image_size=64,
    train_images=110,
    val_images=8,
    groups=(2, 2, 2),
    rare_images=(2, 4),
    common_images=(11, 20),
    frequent_images=(101, 105),
    val_class_images=(3, 5),
    glyph_size=(10, 24),
    not_exhaustive_rate=0.3,
    max_similarity=0.5,
)


def make(out: Path, seed: int = 0, workers: int = 1, preset: GlyphPreset | str = TINY) -> Path:
    return generate_glyph_lvis(preset, out, seed, workers, progress=False)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob('*'))}


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp('glyph') / 'data')


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / 'copy'))


# ------------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize('seed', [0, 7])
def test_full_has_the_class_counts_of_lvis_v1(seed):
    counts = plan_class_counts(PRESETS['full'], seed)
    groups = [frequency_group(int(n)) for n in counts['train']]
    assert [groups.count(g) for g in 'rcf'] == [337, 461, 405]
    assert (counts['train'].min(), counts['train'].max()) == (1, 1977)
    assert abs(counts['train'].sum() - 361_000) < 1_000
    assert counts['val'].min() >= 1


def test_mini_counts():
    counts = plan_class_counts(PRESETS['mini'], 0)
    groups = [frequency_group(int(n)) for n in counts['train']]
    assert [groups.count(g) for g in 'rcf'] == [12, 14, 14]
    assert counts['train'].max() == 700
    assert counts['val'].min() >= 20


def test_which_class_is_rare_depends_on_the_seed():
    rare = [plan_class_counts(PRESETS['mini'], seed)['train'] <= 10 for seed in range(4)]
    assert len({r.tobytes() for r in rare}) == 4


@pytest.mark.parametrize('seed', [0, 1])
def test_mini_plan_fills_images_exactly(seed):
    preset = PRESETS['mini']
    plan = make_plan(preset, seed)
    for split, num_images in preset.num_images.items():
        layout = plan.splits[split]
        found = np.bincount(layout.classes, minlength=preset.num_classes)
        assert (found == plan.counts[split]).all()
        assert len(layout.offsets) == num_images + 1
        for image_id in range(1, num_images + 1):
            classes = layout.classes_of(image_id)
            assert 1 <= len(classes) <= 6
            assert len(np.unique(classes)) == len(classes)
    # Tail classes appear next to frequent ones, as in LVIS.
    layout = plan.splits['train']
    starts = layout.offsets[:-1]
    assert (np.add.reduceat(plan.frequent[layout.classes].astype(int), starts) > 0).all()


def test_mini_glyphs_are_unlike_each_other():
    from mmdet_lt.datasets._glyph_plan import _similarity

    characters = choose_characters(PRESETS['mini'], 0)
    similarity = _similarity(characters)
    np.fill_diagonal(similarity, 0)
    assert len(set(characters)) == 40
    assert similarity.max() < 0.75


def test_preset_that_contradicts_itself_is_refused():
    with pytest.raises(InputError, match=r"'tiny', `rare_images`: expected .* 1\.\.10, found"):
        dataclasses.replace(TINY, rare_images=(2, 12))
    with pytest.raises(InputError, match='val_class_images'):
        dataclasses.replace(TINY, val_class_images=(3, 9))


def test_more_classes_than_glyphs_is_refused():
    with pytest.raises(InputError, match='expected at most'):
        choose_characters(dataclasses.replace(TINY, groups=(2, 3000, 2)), 0)


# ------------------------------------------------------------------------------ content of a folder


def test_bits_do_not_depend_on_the_number_of_workers(finished, tmp_path):
    assert tree(make(tmp_path / 'two', workers=2)) == tree(finished)
    other = tree(make(tmp_path / 'seed1', seed=1))
    assert other.keys() == tree(finished).keys()
    assert other['train/000000000001.png'] != tree(finished)['train/000000000001.png']


def test_only_the_documented_files_are_left(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {'annotations', 'checksums.txt', 'glyph_lvis.json', 'train', 'val'}
    assert len(list((finished / 'train').iterdir())) == TINY.train_images
    manifest = json.loads((finished / 'glyph_lvis.json').read_text())
    assert manifest['complete'] is True
    assert manifest['seed'] == 0
    assert manifest['parameters']['glyph_size'] == [10, 24]
    assert {'pillow', 'freetype', 'matplotlib', 'numpy'} <= manifest['versions'].keys()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_counts_in_the_file_equal_a_recount(finished, split):
    train = json.loads((finished / store.annotation_name('train')).read_text())
    data = json.loads((finished / store.annotation_name(split)).read_text())
    images: dict[int, set[int]] = {c['id']: set() for c in data['categories']}
    instances = dict.fromkeys(images, 0)
    for annotation in train['annotations']:
        images[annotation['category_id']].add(annotation['image_id'])
        instances[annotation['category_id']] += 1
    planned = plan_class_counts(TINY, 0)['train']
    assert [c['id'] for c in data['categories']] == [1, 2, 3, 4, 5, 6]
    assert len({c['synset'] for c in data['categories']}) == 6
    for category in data['categories']:
        count = len(images[category['id']])
        assert category['image_count'] == count == planned[category['id'] - 1]
        assert category['instance_count'] == instances[category['id']]
        assert category['frequency'] == frequency_group(count)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_masks_boxes_and_labels_agree(finished, split, capsys):
    coco = COCO(str(finished / store.annotation_name(split)))
    assert len(coco.getImgIds()) == TINY.num_images[split]
    assert len(coco.getCatIds()) == 6
    for image in coco.loadImgs(coco.getImgIds()):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image['id']))
        present = {a['category_id'] for a in annotations}
        assert present
        assert not present & set(image['neg_category_ids'])
        assert set(image['not_exhaustive_category_ids']) <= present
        masks = [coco.annToMask(a) for a in annotations]
        assert sum(masks).max() == 1, 'masks are visible pixels, so they cannot overlap'
        for annotation, mask in zip(annotations, masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = columns[0], rows[0]
            tight = [x, y, columns[-1] - x + 1, rows[-1] - y + 1]
            assert annotation['bbox'] == pytest.approx(tight)
            assert annotation['area'] == mask.sum() > 0
            assert all(isinstance(v, float) for v in annotation['bbox'])
        boxes = [a['bbox'] for a in annotations]
        overlap = rle.iou(np.array(boxes), np.array(boxes), [0] * len(boxes))
        np.fill_diagonal(overlap, 0)
        assert overlap.max() < 0.3


def test_negatives_are_half_of_the_absent_classes(finished):
    data = json.loads((finished / store.annotation_name('train')).read_text())
    present: dict[int, set[int]] = {}
    for annotation in data['annotations']:
        present.setdefault(annotation['image_id'], set()).add(annotation['category_id'])
    for image in data['images']:
        negative = image['neg_category_ids']
        assert negative == sorted(set(negative))
        assert len(negative) == round(0.5 * (6 - len(present[image['id']])))


def test_an_instance_that_is_not_annotated_is_drawn_and_listed(finished):
    data = json.loads((finished / store.annotation_name('train')).read_text())
    frequency = {c['id']: c['frequency'] for c in data['categories']}
    listed = [i for i in data['images'] if i['not_exhaustive_category_ids']]
    assert 0.1 < len(listed) / len(data['images']) < 0.4
    assert all(frequency[c] == 'f' for i in listed for c in i['not_exhaustive_category_ids'])

    # The same image without the extra instance differs in pixels but hardly in annotations.
    image_id = listed[0]['id']
    plan = make_plan(TINY, 0)
    with_extra = render_image(TINY, plan, 0, 'train', image_id)
    assert with_extra.png == (finished / store.image_name('train', image_id)).read_bytes()
    annotated = [a for a in data['annotations'] if a['image_id'] == image_id]
    assert len(with_extra.annotations) == len(annotated)


def test_pictures_show_something_inside_each_mask(finished):
    data = json.loads((finished / store.annotation_name('val')).read_text())
    contrasts = []
    for annotation in data['annotations']:
        path = finished / store.image_name('val', annotation['image_id'])
        picture = np.asarray(Image.open(path)).astype(float)
        assert picture.shape == (64, 64, 3)
        inside = rle.decode(annotation['segmentation']).astype(bool)
        x, y, w, h = (int(v) for v in annotation['bbox'])
        outside = np.zeros_like(inside)
        outside[max(y - 2, 0) : y + h + 2, max(x - 2, 0) : x + w + 2] = True
        outside &= ~inside
        contrasts.append(abs(picture[inside].mean(0) - picture[outside].mean(0)).max())
    assert np.median(contrasts) > 25


def test_mmdet_reads_it(finished, monkeypatch):
    from mmdet.datasets import LVISV1Dataset

    # The `lvis` package need not be installed: mmdet uses these few methods of it.
    class FakeLVIS(COCO):
        def get_cat_ids(self):
            return sorted(self.cats)

        def get_img_ids(self):
            return sorted(self.imgs)

        def get_ann_ids(self, img_ids):
            return self.getAnnIds(imgIds=img_ids)

        def load_imgs(self, ids):
            return self.loadImgs(ids)

        def load_anns(self, ids):
            return self.loadAnns(ids)

        @property
        def cat_img_map(self):
            return self.catToImgs

        @cat_img_map.setter
        def cat_img_map(self, value):
            pass

    fake = types.SimpleNamespace(LVIS=FakeLVIS, __version__='0')
    monkeypatch.setitem(sys.modules, 'lvis', fake)
    dataset = LVISV1Dataset(
        data_root=str(finished),
        ann_file='annotations/glyph_lvis_train.json',
        data_prefix=dict(img=''),
        filter_cfg=dict(filter_empty_gt=True, min_size=8),
        pipeline=[
            dict(type='mmdet.LoadImageFromFile'),
            dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True),
        ],
    )
    assert len(dataset) == TINY.train_images
    sample = dataset[3]
    assert sample['img'].shape == (64, 64, 3)
    assert len(sample['gt_masks']) == len(sample['gt_bboxes']) > 0
    boxes = sample['gt_masks'].get_bboxes(type(sample['gt_bboxes'])).tensor
    assert (boxes - sample['gt_bboxes'].tensor).abs().max() <= 1


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
