"""Glyph-LVIS: which classes are planned, what is drawn and what the annotation files say."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from glyph_toy import TINY, make, tree
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from mmdet_lt.datasets import _glyph_render
from mmdet_lt.datasets import _glyph_store as store
from mmdet_lt.datasets._glyph_plan import choose_characters, frequency_group, make_plan
from mmdet_lt.datasets._glyph_render import render_image
from mmdet_lt.datasets.glyph_lvis import (
    PRESETS,
    plan_class_counts,
)
from mmdet_lt.errors import InputError


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp('glyph') / 'data')


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


def test_an_instance_that_is_not_annotated_is_drawn_and_listed(finished, monkeypatch):
    data = json.loads((finished / store.annotation_name('train')).read_text())
    frequency = {c['id']: c['frequency'] for c in data['categories']}
    listed = [i for i in data['images'] if i['not_exhaustive_category_ids']]
    assert 0.1 < len(listed) / len(data['images']) < 0.4
    assert all(frequency[c] == 'f' for i in listed for c in i['not_exhaustive_category_ids'])

    drawn = []
    put = _glyph_render._Canvas.put
    monkeypatch.setattr(
        _glyph_render._Canvas, 'put', lambda self, *args: (drawn.append(1), put(self, *args))
    )
    image_id = listed[0]['id']
    again = render_image(TINY, make_plan(TINY, 0), 0, 'train', image_id)
    assert again.png == (finished / store.image_name('train', image_id)).read_bytes()
    annotated = [a for a in data['annotations'] if a['image_id'] == image_id]
    assert len(drawn) == len(annotated) + 1


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
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import LVISV1Dataset
    from mmdet.datasets.transforms import LoadAnnotations

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
        # Objects, not types: how a name resolves depends on the scope that ran last.
        pipeline=[LoadImageFromFile(), LoadAnnotations(with_bbox=True, with_mask=True)],
    )
    assert len(dataset) == TINY.train_images
    sample = dataset[3]
    assert sample['img'].shape == (64, 64, 3)
    assert len(sample['gt_masks']) == len(sample['gt_bboxes']) > 0
    boxes = sample['gt_masks'].get_bboxes(type(sample['gt_bboxes'])).tensor
    assert (boxes - sample['gt_bboxes'].tensor).abs().max() <= 1
