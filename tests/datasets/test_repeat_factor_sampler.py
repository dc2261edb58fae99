"""Repeat-factor sampling: factors, frequencies, ranks, epochs, wrappers."""

import math

import numpy as np
import pytest
from mmdet.registry import DATA_SAMPLERS
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset

from mmdet_lt import InputError
from mmdet_lt.datasets.records import indexed_labels
from mmdet_lt.datasets.samplers import base
from mmdet_lt.datasets.samplers import repeat_factor_sampler as rfs
from mmdet_lt.datasets.samplers._draws import draw_repeats


class Boxes(BaseDataset):
    """A data set of labels only."""

    def __init__(self, labels, num_classes=3):
        self.labels = labels
        super().__init__(metainfo=dict(classes=[f'c{i}' for i in range(num_classes)]))

    def load_data_list(self):
        return [
            dict(instances=[dict(bbox_label=c, ignore_flag=0) for c in image])
            for image in self.labels
        ]

    def get_cat_ids(self, idx):
        return [i['bbox_label'] for i in self.get_data_info(idx)['instances']]


def long_tail(num_images=400, seed=0):
    """Class 0 in nearly every image, class 1 in some, class 2 in four, some images empty."""
    rng = np.random.default_rng(seed)
    labels = [[0] * int(rng.integers(0, 3)) for _ in range(num_images)]
    for i in rng.choice(num_images, 30, replace=False):
        labels[i].append(1)
    for i in rng.choice(num_images, 4, replace=False):
        labels[i].append(2)
    return labels


def build(dataset, **kwargs):
    kwargs.setdefault('seed', 0)
    return DATA_SAMPLERS.build(
        dict(type='mmdet_lt.RepeatFactorSampler', **kwargs), default_args=dict(dataset=dataset)
    )


def test_factors_by_hand():
    np.testing.assert_allclose(
        rfs.class_repeat_factors(np.array([0.01, 0.001, 0.0001, 0]), 1e-3), [1, 1, math.sqrt(10), 1]
    )
    sampler = build(Boxes([[0], [0], [0, 1], [0, 0], []], 4), repeat_thr=1.0)
    # Four annotated images: f = (4/4, 1/4, -, -).
    np.testing.assert_allclose(sampler.class_factors, [1, 2, 1, 1])
    np.testing.assert_allclose(sampler.factors, [1, 1, 2, 1, 1])


def test_crowd_boxes_do_not_count():
    class Crowded(Boxes):
        def load_data_list(self):
            records = super().load_data_list()
            records[0]['instances'][0]['ignore_flag'] = 1
            return records

    assert (build(Crowded([[1], [0], [0]]), repeat_thr=0.9).factors == 1).all()


def test_draws_have_the_right_mean_and_length():
    factors = np.random.default_rng(1).uniform(1, 4, 300)
    draws = np.array([draw_repeats(factors, np.random.default_rng([7, e])) for e in range(4000)])
    assert set(np.unique(draws - np.floor(factors))) <= {0, 1}
    assert np.ptp(draws.sum(1)) <= 1
    # Each rounding is a coin of the fraction: standardised errors of 300 means.
    fraction = factors % 1
    z = (draws.mean(0) - factors) / np.sqrt(fraction * (1 - fraction) / 4000)
    assert abs(z.mean()) < 0.3 and 0.7 < z.std() < 1.3 and np.abs(z).max() < 4.5


@pytest.mark.parametrize('world', [1, 2, 3])
def test_ranks_share_one_list(world, monkeypatch):
    dataset = Boxes(long_tail())
    streams = []
    for rank in range(world):
        monkeypatch.setattr(base, 'get_dist_info', lambda rank=rank: (rank, world))
        sampler = build(dataset, repeat_thr=0.1)
        sampler.set_epoch(3)
        streams.append(list(sampler))
        assert len(streams[-1]) == len(sampler) == math.ceil(sampler.factors.sum() / world)
    joined = [i for group in zip(*streams, strict=True) for i in group]
    assert joined == sampler.epoch_indices(3).tolist()
    assert sampler.factors.sum() - 1 <= len(joined) <= sampler.factors.sum() + world
    drawn = np.bincount(joined, minlength=400)
    assert (drawn >= np.floor(sampler.factors)).all()  # no image is lost


def test_epochs_differ_and_seeds_repeat():
    dataset = Boxes(long_tail())
    one, two, other = build(dataset), build(dataset), build(dataset, seed=1)
    first = list(one)
    assert first == list(two) == list(one)
    assert first != list(other)
    one.set_epoch(1)
    assert first != list(one)
    plain = build(dataset, shuffle=False)
    assert list(plain) == sorted(plain)


def test_iteration_loops_see_every_epoch():
    """MMEngine's infinite iterator calls set_epoch at each restart."""
    from mmengine.runner.loops import _InfiniteDataloaderIterator
    from torch.utils.data import DataLoader

    dataset = Boxes([[0], [0, 1], [0], [], [0], [0]])
    sampler = build(dataset, repeat_thr=0.5)
    loader = DataLoader(
        dataset, batch_size=len(sampler), sampler=sampler, collate_fn=lambda b: len(b)
    )
    seen = []
    original = sampler.epoch_indices
    sampler.epoch_indices = lambda epoch: seen.append(epoch) or original(epoch)
    iterator = _InfiniteDataloaderIterator(loader)
    assert [next(iterator) for _ in range(2)] == [len(sampler)] * 2
    assert seen == [0, 1]


def test_wrapped_sets_are_indexed_from_outside():
    a, b = Boxes([[0], [1, 1], []]), Boxes([[2]])
    index, label = indexed_labels(ConcatDataset([a, b]))
    assert list(zip(index, label, strict=True)) == [(0, 0), (1, 1), (1, 1), (3, 2)]
    index, label = indexed_labels(RepeatDataset(a, 2))
    assert list(zip(index, label, strict=True)) == [(0, 0), (1, 1), (1, 1), (3, 0), (4, 1), (4, 1)]
    balanced = ClassBalancedDataset(Boxes([[0], [0], [0, 1]]), 1.0)
    index, label = indexed_labels(balanced)
    outer = [balanced.get_cat_ids(i) for i in range(len(balanced))]
    assert [sorted(label[index == i].tolist()) for i in range(len(balanced))] == outer
    with pytest.raises(InputError, match='on top of ClassBalancedDataset would re-balance twice'):
        build(balanced)


def test_bad_input():
    with pytest.raises(InputError, match=r'repeat_thr.*found 0'):
        build(Boxes([[0]]), repeat_thr=0)
    with pytest.raises(InputError, match='empty data set'):
        build(type('Nothing', (), dict(__len__=lambda s: 0))())
    with pytest.raises(InputError, match='get_data_info'):
        build(type('Plain', (), dict(__len__=lambda s: 3, __getitem__=lambda s, i: i))())
