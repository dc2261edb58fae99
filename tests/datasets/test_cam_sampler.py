"""CAMSampler: what it draws, for every rank and worker, and what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'cam'))
from cam_toy import make_toy_coco, toy_cams  # noqa: E402

from mmdet_lt.datasets.paste_request import PasteIndex, PasteRequest  # noqa: E402
from mmdet_lt.datasets.samplers.cam_sampler import CAMSampler  # noqa: E402
from mmdet_lt.datasets.transforms.cam_paste import CAMPaste  # noqa: E402
from mmdet_lt.errors import InputError  # noqa: E402
from mmdet_lt.registry import DATA_SAMPLERS, TRANSFORMS  # noqa: E402

KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape')
LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
PACK = [dict(type='PackDetInputs', meta_keys=KEYS)]
PIPELINE = [*LOAD, dict(type='mmdet_lt.CAMPaste'), *PACK]


def thin_out(data):
    """22, 10 and 1 objects of three classes; the last annotation of class 0 is a crowd."""
    labels = [1] * 23 + [2] * 10 + [3]
    data['annotations'] = data['annotations'][: len(labels)]
    for annotation, label in zip(data['annotations'], labels, strict=True):
        annotation['category_id'] = label
    data['annotations'][22]['iscrowd'] = 1


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('toy')
    make_toy_coco(root, num_images=20, boxes_per_image=2)
    data = json.loads((root / 'train.json').read_text())
    thin_out(data)
    (root / 'train.json').write_text(json.dumps(data))
    toy_cams(root, lambda h, w: np.tri(h, w, dtype=bool))
    return root


def dataset(folder, pipeline=PIPELINE, **options):
    init_default_scope('mmdet')
    return DATASETS.build(
        copy.deepcopy(
            dict(
                type='mmdet_lt.LVISDataset',
                data_root=str(folder),
                ann_file='train.json',
                data_prefix=dict(img='train/'),
                pipeline=pipeline,
                serialize_data=False,  # serialising collects garbage each time, 0.3 s
                **options,
            )
        )
    )


def sampler(folder, data=None, **options):
    options = {'mask_source': 'cam', 'cams': str(folder / 'toy.cams'), 'seed': 0, **options}
    if options['mask_source'] != 'cam':
        options.pop('cams')
    return CAMSampler(dataset(folder) if data is None else data, **options)


def stream(chosen, epochs=(0,)):
    """(index, label or None, seed) of each draw."""
    drawn = []
    for epoch in epochs:
        chosen.set_epoch(epoch)
        for index in chosen:
            asked = index.request
            drawn.append((int(index), asked and asked.label, asked and asked.seed))
    return drawn


def as_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr('mmdet_lt.datasets.samplers.base.get_dist_info', lambda: (rank, world_size))


def test_registered():
    assert DATA_SAMPLERS.get('mmdet_lt.CAMSampler') is CAMSampler
    assert TRANSFORMS.get('mmdet_lt.CAMPaste') is CAMPaste
    assert DATA_SAMPLERS.get('CAMSampler') is CAMSampler


def test_plain_images_are_all_drawn(folder):
    chosen = sampler(folder, prob=0.5)
    for epoch in range(3):
        drawn = stream(chosen, [epoch])
        assert sorted(index for index, *_ in drawn) == list(range(20)) and len(chosen) == 20
    labels = [label for _, label, _ in stream(chosen, range(100))]
    pasted = sum(label is not None for label in labels)
    assert abs(pasted - 1000) < 4.5 * np.sqrt(2000 * 0.25)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (dict(distribution='class_balanced'), [1 / 3] * 3),
        (dict(distribution='square_root'), np.sqrt([22, 10, 1])),
        # Half-way: epochs 50 of 100 on; the mean of both ends.
        (
            dict(distribution='progressive', max_epochs=100),
            np.array([22, 10, 1]) / 33 * 0.495 + 0.505 / 3,
        ),
    ],
)
def test_distribution(folder, options, expected):
    """Chi-square of 2,000 drawn classes; 13.8 is its 99.9 % quantile at 2 degrees of freedom."""
    chosen = sampler(folder, prob=1, **options)
    labels = [label for _, label, _ in stream(chosen, range(100))]
    counts = np.bincount(labels, minlength=3)
    expected = np.asarray(expected) / np.sum(expected) * 2000
    assert ((counts - expected) ** 2 / expected).sum() < 13.8


def test_progressive_moves_from_one_end_to_the_other(folder):
    chosen = sampler(folder, prob=1, distribution='progressive', max_samples=4000)
    np.testing.assert_allclose(chosen.class_probabilities(0.0), np.array([22, 10, 1]) / 33)
    np.testing.assert_allclose(chosen.class_probabilities(1.0), [1 / 3] * 3)
    early = [label for _, label, _ in stream(chosen, range(10))]
    late = [label for _, label, _ in stream(chosen, range(190, 210))]
    assert early.count(2) < 20 and 90 < late.count(2) < 180


def test_objects_of_a_class_are_drawn_uniformly(folder):
    chosen = sampler(folder, prob=1)
    rows = np.concatenate([chosen.paste_rows(epoch)[0] for epoch in range(300)])
    counts = np.bincount(rows, minlength=33)[chosen.bank.label == 1]
    expected = counts.sum() / 10
    assert len(counts) == 10 and ((counts - expected) ** 2 / expected).sum() < 27.9
    assert (chosen.bank.label != 1).sum() == 23  # the crowd is not pasted


@pytest.mark.parametrize('world_size', [2, 3])
@pytest.mark.parametrize('same_image', [False, True])
def test_ranks_share_one_stream(folder, monkeypatch, world_size, same_image):
    alone = stream(sampler(folder, same_image=same_image), [1])
    parts = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        parts.append(stream(sampler(folder, same_image=same_image), [1]))
    together = [draw for turn in zip(*parts, strict=True) for draw in turn]
    # The last round is filled up from the start of the list.
    assert together[:20] == alone and together[20:] == alone[: len(together) - 20]


def test_reproducible_and_skippable(folder):
    whole = stream(sampler(folder), [0, 1])
    assert whole == stream(sampler(folder), [0, 1]) != stream(sampler(folder, seed=1), [0, 1])
    for jump in (1, 13, 20, 27):
        chosen = sampler(folder)
        chosen.skip(jump)
        drawn = stream(chosen, [0])
        assert drawn == whole[jump : jump + len(drawn)] and len(drawn) == 20 - jump % 20


@pytest.mark.parametrize('switch', [dict(epoch=2), dict(num_samples=47)])
def test_nothing_is_pasted_before_the_switch(folder, switch):
    """Plain before, the very same stream as without deferral after."""
    chosen, always = sampler(folder, prob=1), sampler(folder, prob=1)
    chosen.defer_until(**switch)
    start = 40 if 'epoch' in switch else 47
    drawn, free = stream(chosen, range(4)), stream(always, range(4))
    assert all(label is None for _, label, _ in drawn[:start])
    assert drawn[start:] == free[start:] and all(label is not None for _, label, _ in drawn[start:])
    assert sorted(index for index, *_ in drawn[:20]) == list(range(20))


def test_deferral_switches_the_background_too(folder):
    background = dict(type='mmdet_lt.ClassBalancedSampler')
    chosen = sampler(folder, background=background, prob=0.5)
    chosen.defer_until(epoch=1)
    assert sorted(index for index, *_ in stream(chosen, [0])) == list(range(20))
    counts = np.bincount([i for i, *_ in stream(chosen, range(1, 40))], minlength=20)
    # The single object of class 2 is in image 16, half of whose draws are for that class.
    assert counts[16] > 4 * np.median(counts) and counts[17:].sum() == 0


def test_same_image(folder):
    """The paper's form: the drawn image holds the drawn object."""
    chosen = sampler(folder, prob=0.7, same_image=True)
    pasted = 0
    for epoch in range(5):
        chosen.set_epoch(epoch)
        for index in chosen:
            if index.request is not None:
                pasted += 1
                info = chosen.dataset.get_data_info(index)
                assert info['img_path'] == index.request.img_path
                boxes = [tuple(i['bbox']) for i in info['instances']]
                assert index.request.box in boxes
    assert 50 < pasted < 90
    shares = chosen.image_probabilities()
    counts = np.bincount(
        np.concatenate([chosen.epoch_indices(epoch) for epoch in range(500)]), minlength=20
    )
    np.testing.assert_allclose(shares.sum(), 1)
    np.testing.assert_allclose(counts / counts.sum(), shares, atol=0.012)


def test_state(folder):
    chosen = sampler(folder, seed=3)
    state = copy.deepcopy(chosen.state_dict())
    other = sampler(folder, seed=9)
    other.load_state_dict(state)
    assert stream(other, [4]) == stream(chosen, [4])
    for options in (dict(prob=0.2), dict(distribution='square_root'), dict(mask_source='box')):
        with pytest.raises(InputError, match='another sampler'):
            sampler(folder, seed=3, **options).load_state_dict(state)


def pictures(folder, workers):
    """Sum of the pixels and number of objects of each image of two epochs, deferred by one."""
    data = dataset(folder)
    chosen = sampler(folder, data, prob=1)
    chosen.defer_until(epoch=1)
    loader = DataLoader(
        data,
        batch_size=3,
        sampler=chosen,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=list,
    )
    found = []
    for epoch in range(2):
        chosen.set_epoch(epoch)
        for batch in loader:
            for sample in batch:
                objects = len(sample['data_samples'].gt_instances)
                found.append((int(sample['inputs'].sum()), objects))
    return found


def test_workers_paste_the_same(folder):
    """Pictures depend on the seed alone, and persistent workers learn of the switch."""
    alone = pictures(folder, 0)
    assert alone == pictures(folder, 2)
    before, after = (sum(objects for _, objects in part) for part in (alone[:20], alone[20:]))
    assert before == 33 and after > 45


def test_pasted_record(folder):
    """One image end to end: the triangle of the CAM file, nothing outside of it."""
    still = dict(flip_prob=0, rotation=0, scale=(1, 1), translate=False)
    data = dataset(folder, [*LOAD, dict(type='mmdet_lt.CAMPaste', **still), *PACK])
    chosen = sampler(folder, data, prob=1)
    plain = dataset(folder, [*LOAD, *PACK])
    index = next(iter(chosen))
    after = data[index]
    changed = (after['inputs'] != plain[int(index)]['inputs']).any(0).numpy()
    x0, y0, x1, y1 = (int(v) for v in index.request.box)
    triangle = np.zeros_like(changed)
    triangle[y0:y1, x0:x1] = np.tri(y1 - y0, x1 - x0, dtype=bool)
    assert changed.any() and not (changed & ~triangle).any()
    assert after['data_samples'].gt_instances.labels[-1] == index.request.label


def test_multi_image_wrappers_pass_the_request_on(folder):
    inner = dict(
        type='mmdet_lt.LVISDataset',
        data_root=str(folder),
        ann_file='train.json',
        data_prefix=dict(img='train/'),
        pipeline=PIPELINE[:-1],
    )
    init_default_scope('mmdet')
    data = DATASETS.build(dict(type='MultiImageMixDataset', dataset=inner, pipeline=PACK))
    chosen = sampler(folder, data, prob=1)
    index = next(iter(chosen))
    before = len(chosen.bank.dataset.get_data_info(int(index))['instances'])
    assert len(data[index]['data_samples'].gt_instances) in (before, before + 1)
    assert data[index]['data_samples'].gt_instances.labels[-1] == index.request.label


def test_index_travels():
    asked = PasteRequest('a.png', 5, 6, (0, 0, 2, 2), 1, 'box', None, 7)
    for made in (PasteIndex(4, asked), PasteIndex(4)):
        for copied in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            assert copied == 4 and copied.request == made.request


def test_classes_without_objects_are_left_out(folder, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        'mmdet_lt.datasets._paste_bank.print_log', lambda text, logger: told.append(text)
    )
    data = json.loads((folder / 'train.json').read_text())
    data['annotations'] = data['annotations'][:-1]
    (tmp_path / 'train.json').write_text(json.dumps(data))
    (tmp_path / 'train').symlink_to(folder / 'train')
    chosen = sampler(tmp_path, mask_source='mask', prob=1)
    assert chosen.class_probabilities().tolist() == [0.5, 0.5, 0]
    assert {label for _, label, _ in stream(chosen, range(9))} == {0, 1}
    assert any('1 of 3 classes' in text and 'class_2' in text for text in told)


def edited(folder, tmp_path, change):
    data = json.loads((folder / 'train.json').read_text())
    change(data)
    (tmp_path / 'train.json').write_text(json.dumps(data))
    (tmp_path / 'train').symlink_to(folder / 'train')
    return tmp_path


def test_one_image(folder, tmp_path):
    def change(data):
        data['images'] = data['images'][:1]
        data['annotations'] = data['annotations'][:1]

    chosen = sampler(edited(folder, tmp_path, change), mask_source='box', prob=1)
    assert [draw[:2] for draw in stream(chosen, range(3))] == [(0, 0)] * 3


@pytest.mark.parametrize('source', ['mask', 'box', 'cam'])
def test_crowds_only(folder, tmp_path, source):
    def change(data):
        for annotation in data['annotations']:
            annotation['iscrowd'] = 1

    with pytest.raises(InputError, match='found no box|none of the 0 objects'):
        sampler(edited(folder, tmp_path, change), mask_source=source)


def test_masks_are_missing(folder, tmp_path):
    def change(data):
        for annotation in data['annotations']:
            del annotation['segmentation']

    with pytest.raises(InputError, match="mask_source='mask'.*needs segmentations, found none"):
        sampler(edited(folder, tmp_path, change), mask_source='mask')


def test_other_cams(folder, tmp_path):
    def refused(sentence, root=folder, **options):
        with pytest.raises(InputError, match=sentence):
            sampler(root, **options)

    refused('CAM file .*nothing there: correct `train_dataloader.sampler.cams`', cams='no.cams')
    refused("mask_source='cam'. needs .train_dataloader.sampler.cams", cams=None)
    refused(
        "`cams` and `checkpoint` are for|are for mask_source='cam'",
        mask_source='box',
        checkpoint='x',
    )
    refused('one of .*found .grabcut', mask_source='grabcut')
    refused('neither', checkpoint='no.pth')
    refused(r'come from checkpoint stage1.pth.*is 1{32}', checkpoint='1' * 32)
    sampler(folder, checkpoint='0' * 32)
    (tmp_path / 'other.pth').write_text('x')
    refused('come from checkpoint stage1.pth', checkpoint=str(tmp_path / 'other.pth'))
    other = edited(folder, tmp_path, lambda data: data['images'].pop())
    refused('were made for annotation file train.json', root=other, cams=str(folder / 'toy.cams'))
    fewer = toy_cams(other, lambda h, w: np.ones((h, w), bool), classes=['class_0', 'class_7'])
    refused('disagree about class_1, class_2, class_7', root=other, cams=str(fewer))


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (dict(distribution='uniform'), "`train_dataloader.sampler.distribution`.*'uniform'"),
        (dict(prob=0), r'`train_dataloader.sampler.prob`.*\(0, 1\], found 0'),
        (dict(prob=1.1), 'found 1.1'),
        (dict(distribution='progressive'), 'max_epochs=None, max_samples=None'),
        (dict(distribution='progressive', max_epochs=0), 'max_epochs=0'),
        (dict(max_epochs=3), 'none otherwise'),
        (dict(background=dict(type='DefaultSampler')), 'another re-balancing.*DefaultSampler'),
        (dict(seed=-1), 'seed'),
    ],
)
def test_bad_arguments(folder, options, sentence):
    with pytest.raises(InputError, match=sentence):
        sampler(folder, **options)


RESIZE = dict(type='Resize', scale=(64, 64))
PASTE = dict(type='mmdet_lt.CAMPaste')
WITH_SEG = dict(type='LoadAnnotations', with_bbox=True, with_seg=True)


@pytest.mark.parametrize(
    ('pipeline', 'sentence'),
    [
        ([*LOAD, *PACK], 'needs one mmdet_lt.CAMPaste .*found 0'),
        ([*LOAD, PASTE, PASTE, *PACK], 'found 2'),
        ([*LOAD, RESIZE, PASTE, *PACK], "directly after.*'Resize'"),
        ([PASTE, *LOAD, *PACK], 'directly after'),
        ([LOAD[0], PASTE, LOAD[1], *PACK], 'directly after'),
        ([LOAD[0], WITH_SEG, PASTE, *PACK], 'semantic maps'),
        ([LOAD[0], dict(type='LoadAnnotations', with_bbox=False), PASTE, *PACK], 'with boxes'),
    ],
)
def test_bad_pipelines(folder, pipeline, sentence):
    with pytest.raises(InputError, match=sentence):
        sampler(folder, dataset(folder, pipeline))


@pytest.mark.parametrize('kind', ['RepeatDataset', 'ConcatDataset', 'ClassBalancedDataset'])
def test_wrappers_that_move_indices(folder, kind):
    part = dataset(folder)
    init_default_scope('mmdet')
    config = dict(type=kind, dataset=part)
    if kind == 'RepeatDataset':
        config['times'] = 2
    elif kind == 'ConcatDataset':
        config = dict(type=kind, datasets=[part, dataset(folder)])
    else:
        config['oversample_thr'] = 0.1
    with pytest.raises(InputError, match='changes indices|re-balance twice'):
        sampler(folder, DATASETS.build(config))
