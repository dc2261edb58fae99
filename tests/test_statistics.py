"""ClassStatistics from files and data sets, well-formed and not."""

import json
import time

import numpy as np
import pytest

from mmdet_lt import ClassStatistics, InputError

IDS = [1000, 3, 91, 7, 200, 11, 90]  # unsorted, with gaps


def coco(frequency=False):
    """7 classes; ids 11 and 200 have no image; one crowd box of id 3."""
    categories = [dict(id=i, name=f'thing {i}') for i in IDS]
    if frequency:
        for category in categories:
            category['frequency'] = 'f' if category['id'] == 3 else 'r'
    images = [dict(id=i * 7 + 1, width=20, height=20, file_name=f'{i}.png') for i in range(4)]
    boxes = [(1, 3), (1, 3), (1, 1000), (8, 3), (8, 91), (15, 7), (15, 90)]
    annotations = [
        dict(id=k, image_id=i, category_id=c, bbox=[1, 1, 5, 5], area=25, iscrowd=0)
        for k, (i, c) in enumerate(boxes)
    ]
    annotations.append(
        dict(id=99, image_id=22, category_id=3, bbox=[1, 1, 5, 5], area=25, iscrowd=1)
    )
    return dict(images=images, categories=categories, annotations=annotations)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv('MMDET_LT_CACHE', str(tmp_path / 'cache'))

    def _write(data, name='ann.json'):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return _write


def test_counts_follow_ascending_ids(write):
    stats = ClassStatistics.from_file(write(coco()))
    assert stats.classes == tuple(f'thing {i}' for i in sorted(IDS))
    assert stats.image_count.tolist() == [2, 1, 0, 1, 1, 0, 1]
    assert stats.instance_count.tolist() == [3, 1, 0, 1, 1, 0, 1]
    assert stats.image_count.dtype == stats.instance_count.dtype == np.int64
    assert (stats.num_images, stats.num_annotated_images) == (4, 3)
    assert stats.groups.tolist() == ['r'] * 7
    np.testing.assert_allclose(stats.image_frequency[0], 2 / 3)


def test_thresholds_and_stated_groups(write):
    stats = ClassStatistics.from_file(write(coco()), thresholds=(0, 1))
    assert ''.join(stats.groups) == 'fcrccrc'
    stats = ClassStatistics.from_file(write(coco(True), 'stated.json'), thresholds=(0, 1))
    assert ''.join(stats.groups) == 'frrrrrr'


def test_save_load_and_cache(write, tmp_path):
    path = write(coco(True))
    stats = ClassStatistics.from_file(path)
    stats.save(tmp_path / 'stats.json')
    assert ClassStatistics.load(tmp_path / 'stats.json') == stats
    assert ClassStatistics.from_any(str(tmp_path / 'stats.json')) == stats
    cached = list((tmp_path / 'cache' / 'statistics').iterdir())
    assert len(cached) == 1
    assert ClassStatistics.from_file(path) == stats
    cached[0].write_text('{')  # damaged: computed again
    assert ClassStatistics.from_file(path) == stats
    changed = coco(True)
    changed['annotations'].pop(0)
    assert ClassStatistics.from_file(write(changed)).instance_count[0] == 2


def test_align_reorders_and_refuses_strangers(write):
    stats = ClassStatistics.from_file(write(coco()))
    other = stats.align(['thing 91', 'thing 3'])
    assert other.image_count.tolist() == [1, 2]
    lvis = ClassStatistics(['speaker_(stero_equipment)'], [1], [1], 1)  # sic, in the LVIS files
    assert lvis.align(['speaker_(stereo_equipment)']).image_count.tolist() == [1]
    with pytest.raises(InputError, match="2 of the 3 classes.*'cat'"):
        stats.align(['thing 3', 'cat', 'dog'])


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (lambda d: d['annotations'][0].update(category_id=5), 'category_id 5.*7 ids'),
        (lambda d: d['annotations'][0].update(image_id=5), 'image_id 5.*4 ids'),
        (lambda d: d['annotations'][0].pop('image_id'), 'no `image_id`'),
        (lambda d: d.pop('categories'), 'no list `categories`'),
        (lambda d: d['categories'].append(dict(id=3, name='x')), 'two categories with one id'),
        (lambda d: d['categories'].append(dict(id=4, name='thing 3')), "'thing 3' occurs twice"),
        (lambda d: d['categories'][0].update(frequency='z'), "'r', 'c' or 'f'"),
    ],
)
def test_bad_annotations_name_what_is_wrong(write, change, words):
    data = coco(True)
    change(data)
    with pytest.raises(InputError, match=words):
        ClassStatistics.from_file(write(data))


def test_missing_and_truncated_files(write, tmp_path):
    with pytest.raises(InputError, match='found nothing there'):
        ClassStatistics.from_file(tmp_path / 'no.json')
    with pytest.raises(InputError, match='not complete JSON'):
        ClassStatistics.from_file(write(json.dumps(coco())[:-40]))
    with pytest.raises(InputError, match='no class statistics file'):
        ClassStatistics.load(write(coco()))


@pytest.mark.parametrize(
    ('values', 'words'),
    [
        (dict(image_count=[1, 2], instance_count=[2, 2, 2]), r'expected shape \(3,\)'),
        (dict(image_count=[1, 2, -1], instance_count=[2, 2, 2]), 'at least 0'),
        (dict(image_count=[1, 2, 0.5], instance_count=[2, 2, 2]), 'whole numbers'),
        (dict(image_count=[1, 2, 3], instance_count=[2, 2, 2]), 'image_count cannot'),
        (dict(image_count=[1, 2, 3], instance_count=[2, 2, 3], thresholds=(9, 3)), 'thresholds'),
    ],
)
def test_impossible_values(values, words):
    with pytest.raises(InputError, match=words):
        ClassStatistics(('a', 'b', 'c'), num_images=10, **values)


def test_counts_cannot_be_changed(write):
    stats = ClassStatistics.from_file(write(coco()))
    with pytest.raises(ValueError, match='read-only'):
        stats.image_count[0] = 5


def test_one_pass_over_a_large_file():
    """A tenth of LVIS train; reading each annotation a second time would show in the spy."""
    rng = np.random.default_rng(0)
    reads = 0

    class Annotation(dict):
        def __getitem__(self, key):
            nonlocal reads
            reads += 1
            return super().__getitem__(key)

    pairs = rng.integers((0, 1), (10_000, 1204), (127_000, 2)).tolist()
    annotations = [Annotation(image_id=i, category_id=c) for i, c in pairs]
    data = dict(
        images=[dict(id=i) for i in range(10_000)],
        categories=[dict(id=i, name=f'c{i}') for i in range(1, 1204)],
        annotations=annotations,
    )
    start = time.perf_counter()
    stats = ClassStatistics.from_annotations(data)
    assert time.perf_counter() - start < 5
    assert reads == 2 * len(annotations)
    assert stats.instance_count.sum() == len(annotations)
    assert stats.image_count.sum() == len({tuple(pair) for pair in pairs})


class TestDatasets:
    """Counts through mmdet data sets and wrappers."""

    @pytest.fixture
    def dataset(self, write, tmp_path):
        import cv2

        from mmdet_lt.datasets.lvis_dataset import LVISDataset

        data = coco()
        for image in data['images']:
            cv2.imwrite(str(tmp_path / image['file_name']), np.zeros((20, 20, 3), np.uint8))
        return LVISDataset(
            ann_file=str(write(data)), data_prefix=dict(img=str(tmp_path)), pipeline=[]
        )

    def test_own_dataset(self, dataset, write):
        expected = ClassStatistics.from_file(write(coco()))
        stats = ClassStatistics.from_dataset(dataset)
        assert stats.image_count.tolist() == expected.image_count.tolist()
        assert stats.instance_count.tolist() == expected.instance_count.tolist()
        assert dataset.metainfo['classes'] == expected.classes

    def test_stock_coco_dataset(self, write, tmp_path):
        from mmdet.datasets import CocoDataset

        names = tuple(c['name'] for c in coco()['categories'])
        stock = CocoDataset(
            ann_file=str(write(coco())),
            metainfo=dict(classes=names),
            data_prefix=dict(img=''),
            pipeline=[],
        )
        stats = ClassStatistics.from_dataset(stock)
        expected = ClassStatistics.from_file(write(coco()))
        assert stats.align(expected.classes).image_count.tolist() == expected.image_count.tolist()

    def test_wrappers_do_not_change_counts(self, dataset):
        from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset

        plain = ClassStatistics.from_dataset(dataset)
        for wrapped in (RepeatDataset(dataset, 3), ClassBalancedDataset(dataset, 0.9)):
            stats = ClassStatistics.from_dataset(wrapped)
            assert stats.image_count.tolist() == plain.image_count.tolist()
            assert stats.num_images == 4
        twice = ClassStatistics.from_dataset(ConcatDataset([dataset, dataset]))
        assert twice.image_count.tolist() == (2 * plain.image_count).tolist()

    def test_chosen_classes_set_the_label_order(self, write, tmp_path):
        from mmdet_lt.datasets.lvis_dataset import LVISDataset

        def build(names, **kwargs):
            return LVISDataset(
                ann_file=str(write(coco())),
                metainfo=dict(classes=names),
                data_prefix=dict(img=str(tmp_path)),
                require_images=False,
                pipeline=[],
                **kwargs,
            )

        stats = ClassStatistics.from_dataset(build(('thing 91', 'thing 3')))
        assert stats.instance_count.tolist() == [1, 3]
        with pytest.raises(InputError, match='metainfo.classes'):
            build(('thing 91', 'unicorn'))
        with pytest.raises(InputError, match='filter_cfg'):
            build(('thing 11',), filter_cfg=dict(filter_empty_gt=True))

    def test_missing_images_are_reported_before_training(self, write, tmp_path):
        from mmdet_lt.datasets.lvis_dataset import LVISDataset

        with pytest.raises(InputError, match='4 of the 4 images.*0.png'):
            LVISDataset(
                ann_file=str(write(coco())), data_prefix=dict(img=str(tmp_path)), pipeline=[]
            )
