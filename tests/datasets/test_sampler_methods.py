"""Each method by itself: factors and shares by hand, arguments, wrong arguments."""

import math

import numpy as np
import pytest
from sampler_toy import Boxes, build, long_tail
from toy import make_toy_coco

from mmdet_lt import InputError
from mmdet_lt.datasets import records
from mmdet_lt.datasets.lvis_dataset import LVISDataset
from mmdet_lt.datasets.records import dataset_labels
from mmdet_lt.datasets.samplers import instance_aware_repeat_factor_sampler as irfs
from mmdet_lt.datasets.samplers._draws import cap_draws
from mmdet_lt.datasets.samplers.repeat_factor_sampler import class_repeat_factors


def test_instance_aware_factors_by_hand():
    # METHODS, appendix A: f_img = .01, .001, .0001, boxes 1000, 100, 10, t = .001.
    image, boxes = np.array([0.01, 0.001, 0.0001]), np.array([1000, 100, 10])
    frequency = irfs._MEANS['geometric'](image, boxes / boxes.sum())
    np.testing.assert_allclose(class_repeat_factors(frequency, 1e-3), [1, 1, 1.026433], atol=1e-6)


@pytest.mark.parametrize(
    'mean, frequency',
    [
        ('geometric', math.sqrt(0.25 * 0.1)),
        ('arithmetic', 0.175),
        ('harmonic', 1 / 7),
        ('quadratic', math.sqrt((0.0625 + 0.01) / 2)),
        ('instance', 0.1),
    ],
)
def test_instance_aware_means(mean, frequency):
    """Class 1: one of four annotated images, one of ten boxes; class 2 does not occur."""
    dataset = Boxes([[0, 0, 0], [0, 0, 0], [0, 0], [0, 1], []])
    sampler = build('InstanceAwareRepeatFactorSampler', dataset, repeat_thr=1.0, mean=mean)
    factor = max(1.0, math.sqrt(1 / frequency))
    assert sampler.class_factors[1] == pytest.approx(factor)
    assert sampler.class_factors[2] == 1
    assert sampler.factors[3] == pytest.approx(factor) and sampler.factors[4] == 1


def test_unknown_mean():
    with pytest.raises(InputError, match=r"sampler\.mean.*found 'median'"):
        build('InstanceAwareRepeatFactorSampler', Boxes([[0]]), mean='median')


# Classes 0, 1, 2 in 3, 2, 1 images; class 3 nowhere; image 4 is empty.
HAND = [[0, 0], [0, 1], [0], [1, 2], []]


def test_class_balanced_shares_by_hand():
    sampler = build('ClassBalancedSampler', Boxes(HAND, 4))
    a, b, c = 1 / 3 / 3, 1 / 3 / 2, 1 / 3 / 1
    np.testing.assert_allclose(sampler.image_probabilities(), [a, a + b, a, b + c, 0])
    assert len(sampler) == 5


def test_square_root_shares_by_hand():
    sampler = build('SquareRootSampler', Boxes(HAND, 4))
    total = math.sqrt(3) + math.sqrt(2) + 1
    a, b, c = math.sqrt(3) / total / 3, math.sqrt(2) / total / 2, 1 / total
    np.testing.assert_allclose(sampler.image_probabilities(), [a, a + b, a, b + c, 0])


@pytest.mark.parametrize('epoch, progress', [(0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)])
def test_progressive_shares_by_hand(epoch, progress):
    sampler = build('ProgressivelyBalancedSampler', Boxes(HAND, 4), max_epochs=4)
    p = [(1 - progress) * n / 6 + progress / 3 for n in (3, 2, 1)]
    a, b, c = p[0] / 3, p[1] / 2, p[2]
    np.testing.assert_allclose(sampler.image_probabilities(epoch), [a, a + b, a, b + c, 0])


def test_progress_by_position():
    """Class 1 is in 2 of 100 images: its share grows from 2% to 50% within one epoch."""
    dataset = Boxes([[1], [1]] + [[0]] * 98)
    sampler = build('ProgressivelyBalancedSampler', dataset, max_samples=200)
    np.testing.assert_allclose(sampler.progress(1)[[0, -1]], [101 / 200, 1.0])
    assert (sampler.progress(2) == 1).all()
    halves = np.zeros(4)
    for seed in range(200):
        sampler.seed = seed
        drawn = np.concatenate([sampler.epoch_indices(0), sampler.epoch_indices(1)]) < 2
        halves += drawn.reshape(4, 50).mean(1) / 200
    middle = (np.arange(4) * 50 + 25.5) / 200
    np.testing.assert_allclose(halves, 0.02 + middle * 0.48, atol=0.02)


@pytest.mark.parametrize(
    'wrong', [{}, dict(max_epochs=2, max_samples=5), dict(max_epochs=0), dict(max_samples=-3)]
)
def test_progress_needs_one_horizon(wrong):
    with pytest.raises(InputError, match='one positive number, `max_epochs`.*`max_samples`'):
        build('ProgressivelyBalancedSampler', Boxes([[0]]), **wrong)


@pytest.mark.parametrize('name', ['ClassBalancedSampler', 'SquareRootSampler'])
def test_cap_of_repeats(name):
    dataset = Boxes(long_tail())
    free = build(name, dataset).image_probabilities() * 400
    sampler = build(name, dataset, max_repeats=3)
    capped = sampler.image_probabilities() * 400
    assert (
        free.max() > 3 and capped.max() == pytest.approx(3) and capped.sum() == pytest.approx(400)
    )
    below = (capped < 2.999) & (free > 0)
    # What is below the cap keeps its proportions.
    np.testing.assert_allclose(np.ptp(capped[below] / free[below]), 0, atol=1e-9)
    assert np.bincount(sampler.epoch_indices(0)).max() <= 3
    assert sampler.state_dict()['parameters']['max_repeats'] == 3


def test_cap_by_hand():
    # 10 draws, cap 4: image 0 gives 2 away in proportion 3 : 1; then image 1 is above and gives .5.
    np.testing.assert_allclose(cap_draws(np.array([6.0, 3.0, 1.0, 0]), 4), [4, 4, 2, 0])
    np.testing.assert_allclose(cap_draws(np.array([2.0, 2.0]), 2), [2, 2])


def test_caps_that_cannot_fill_an_epoch():
    dataset = Boxes([[0], [], [], []])
    with pytest.raises(InputError, match=r'max_repeats` must be at least 4\.000.*found 3'):
        build('ClassBalancedSampler', dataset, max_repeats=3)
    assert list(build('ClassBalancedSampler', dataset, max_repeats=4)) == [0] * 4
    with pytest.raises(InputError, match='max_repeats` must be a positive number'):
        build('ClassBalancedSampler', dataset, max_repeats=0)


def test_labels_are_read_once_and_again_after_a_change():
    dataset = Boxes([[0], [1, -1], [2]], serialize_data=True)
    first = dataset_labels(dataset)
    assert [c.tolist() for c in first] == [[0, 1, 2], [0, 1, 2]]
    again = dataset_labels(dataset)
    assert again[0] is first[0] and again[1] is first[1]
    with pytest.raises(ValueError, match='read-only'):
        again[1][0] = 2
    dataset.get_subset_([2, 1])
    assert [c.tolist() for c in dataset_labels(dataset)] == [[0, 1], [2, 1]]


def test_own_data_sets_note_labels_while_parsing(tmp_path, monkeypatch):
    """Nothing is unpickled for the factors, and the labels are those of the records."""
    path = make_toy_coco(tmp_path)
    data_set = LVISDataset(
        ann_file=str(path), data_prefix=dict(img=str(tmp_path / 'train')), pipeline=[]
    )
    with monkeypatch.context() as patch:
        patch.setattr(records.pickle, 'loads', None)
        noted = dataset_labels(data_set)
        build('RepeatFactorSampler', data_set)
    records._KNOWN.clear()
    read = dataset_labels(data_set)
    assert noted[0] is not read[0] and len(read[0]) == 16
    np.testing.assert_array_equal(noted, read)
