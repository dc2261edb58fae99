"""What all re-balancing samplers share: ranks, epochs, skipping, deferral, state, bad input."""

from itertools import islice

import numpy as np
import pytest
from mmengine.dataset import ClassBalancedDataset, ConcatDataset, RepeatDataset
from sampler_toy import SAMPLERS, Boxes, build, long_tail

from mmdet_lt import ClassStatistics, InputError
from mmdet_lt.datasets.samplers import base

ALL = pytest.mark.parametrize('name', list(SAMPLERS))


def endless(sampler, first_epoch=0):
    """What MMEngine's iterator of iteration loops does with a sampler."""
    epoch = first_epoch
    while True:
        yield from sampler
        epoch += 1
        sampler.set_epoch(epoch)


def stream(sampler, number):
    return list(islice(endless(sampler), number))


def on_rank(monkeypatch, rank, world, name, dataset, **kwargs):
    monkeypatch.setattr(base, 'get_dist_info', lambda: (rank, world))
    return build(name, dataset, **SAMPLERS[name], **kwargs)


# ---- streams -----------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize('deferred', [False, True])
def test_the_stream_does_not_depend_on_the_number_of_ranks(name, deferred, monkeypatch):
    dataset = Boxes(long_tail())
    joined = {}
    for world in (1, 2, 3):
        samplers = [on_rank(monkeypatch, rank, world, name, dataset) for rank in range(world)]
        for sampler in samplers:
            if deferred:  # 300 of the shared positions, in the middle of the first epoch
                sampler.defer_until(num_samples=300 // world)
        epochs = []
        for epoch in range(3):
            parts = []
            for sampler in samplers:
                sampler.set_epoch(epoch)
                parts.append(list(sampler))
                assert len(parts[-1]) == len(sampler)
            epochs.append([i for group in zip(*parts, strict=True) for i in group])
        joined[world] = epochs
    size = samplers[0].epoch_size
    for world in (2, 3):
        for epoch in range(3):
            assert joined[world][epoch][:size] == joined[1][epoch][:size]
            assert len(joined[world][epoch]) < size + world


@ALL
def test_equal_seeds_give_equal_streams_of_constant_length(name):
    dataset = Boxes(long_tail())
    one, two = (build(name, dataset, **SAMPLERS[name]) for _ in range(2))
    other = build(name, dataset, **dict(SAMPLERS[name], seed=1))
    first = list(one)
    assert first == list(two) == list(one) and first != list(other)
    epochs = []
    for epoch in range(6):
        one.set_epoch(epoch)
        epochs.append(list(one))
    assert {len(e) for e in epochs} == {len(one)}
    assert len({tuple(e) for e in epochs}) == 6
    one.set_epoch(2)  # the order in which epochs are asked for does not matter
    assert list(one) == epochs[2]
    assert {type(i) for i in first} == {int}


@ALL
def test_a_drawn_seed_is_shared(name, monkeypatch):
    monkeypatch.setattr(base, 'sync_random_seed', lambda: 77)
    assert build(name, Boxes(long_tail()), **SAMPLERS[name], seed=None).seed == 77


@ALL
def test_without_shuffling_the_order_is_that_of_the_data(name):
    sampler = build(name, Boxes(long_tail()), **SAMPLERS[name], shuffle=False)
    if name != 'ProgressivelyBalancedSampler':
        drawn = list(sampler)[:-1]  # the last one may fill the epoch up, from its start
        assert drawn == sorted(drawn)
    sampler.defer_until(epoch=1)
    assert list(sampler)[:400] == list(range(400))


# ---- frequencies -------------------------------------------------------------------------------


@ALL
def test_drawn_frequencies_match_the_expected_ones(name):
    """Chi-square of 600 drawn epochs against `image_probabilities`, and against a wrong guess.

    Counts vary less than independent draws would, so the statistic may be far below the degrees of
    freedom but not above; each deviation is measured against the sampler's own spread, too.
    """
    sampler = build(name, Boxes(long_tail(120)), **dict(SAMPLERS[name]))
    repeats = 600
    epoch = 3
    draws = np.zeros((repeats, 120))
    for turn in range(repeats):
        sampler.seed = turn
        draws[turn] = np.bincount(sampler.epoch_indices(epoch)[: sampler.epoch_size], minlength=120)
    shares = sampler.image_probabilities(epoch)
    assert shares.shape == (120,) and abs(shares.sum() - 1) < 1e-12
    total, expected = draws.sum(0), shares * draws.sum()
    drawn = expected > 0
    assert total[~drawn].sum() == 0

    def chi_square(guess):
        return ((total - guess)[drawn] ** 2 / guess[drawn]).sum()

    freedom = drawn.sum() - 1
    assert chi_square(expected) < freedom + 4 * np.sqrt(2 * freedom)
    wrong = np.where(drawn, 1.0, 0.0)
    assert chi_square(wrong / wrong.sum() * draws.sum()) > 2 * freedom + 50
    spread = draws.std(0)[drawn]
    z = (total - expected)[drawn] / np.maximum(spread * np.sqrt(repeats), 1)
    assert np.abs(z).max() < 4.5


@ALL
def test_images_without_boxes(name):
    labels = long_tail()
    empty = np.array([not image for image in labels])
    shares = build(name, Boxes(labels), **SAMPLERS[name]).image_probabilities()
    assert empty.any()
    if 'RepeatFactor' in name:  # factor 1
        assert (shares[empty] == shares.min()).all() and shares.min() > 0
    else:
        assert (shares[empty] == 0).all() and (shares[~empty] > 0).all()


# ---- skipping ----------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize('deferred', [False, True])
def test_skipping_equals_replaying(name, deferred, monkeypatch):
    dataset = Boxes(long_tail(50))
    for rank, world in ((0, 1), (1, 2)):
        full = on_rank(monkeypatch, rank, world, name, dataset)
        length = len(full)
        if deferred:
            full.defer_until(num_samples=length + 7)
        everything = stream(full, 4 * length)
        for number in (0, 1, length - 1, length, length + 3, 2 * length, 3 * length + 5):
            sampler = on_rank(monkeypatch, rank, world, name, dataset)
            if deferred:
                sampler.defer_until(num_samples=length + 7)
            sampler.skip(number)
            assert stream(sampler, 4 * length - number) == everything[number:]


def test_skipping_draws_only_the_epoch_it_ends_in():
    sampler = build('ClassBalancedSampler', Boxes(long_tail()))
    seen = []
    original = sampler.epoch_indices
    sampler.epoch_indices = lambda epoch: seen.append(epoch) or original(epoch)
    sampler.skip(10**9 * len(sampler) + 3)
    assert len(list(sampler)) == len(sampler) - 3
    assert seen == [10**9]
    assert len(list(sampler)) == len(sampler)  # a skip counts once
    with pytest.raises(InputError, match=r'skip\(\).*found -1'):
        sampler.skip(-1)


def test_two_skips_add_up():
    one, two = (build('SquareRootSampler', Boxes(long_tail(50))) for _ in range(2))
    one.skip(30)
    one.skip(45)
    two.skip(75)
    assert stream(one, 100) == stream(two, 100)


# ---- deferral ----------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize(
    'switch', [dict(epoch=2), dict(num_samples=0), dict(num_samples=17), dict(num_samples=333)]
)
def test_deferral_is_exact(name, switch):
    dataset = Boxes(long_tail(80))
    balanced = build(name, dataset, **SAMPLERS[name])
    deferred = build(name, dataset, **SAMPLERS[name])
    never = build(name, dataset, **SAMPLERS[name])
    deferred.defer_until(**switch)
    never.defer_until(num_samples=10**9)
    length = len(balanced)
    position = switch['epoch'] * length if 'epoch' in switch else switch['num_samples']
    assert deferred.switch_sample == position and len(deferred) == length
    number = max(4 * length, position + length)
    after, plain, mixed = (stream(s, number) for s in (balanced, never, deferred))
    assert mixed == plain[:position] + after[position:]
    # Plain: every pass over the data set holds each image once, whatever the epoch length.
    for start in range(0, number - 80, 80):
        assert sorted(plain[start : start + 80]) == list(range(80))


def test_expected_shares_know_the_switch():
    sampler = build('ClassBalancedSampler', Boxes(long_tail(80)))
    balanced, uniform = sampler.image_probabilities(), np.full(80, 1 / 80)
    sampler.defer_until(num_samples=80 + 20)
    np.testing.assert_allclose(sampler.image_probabilities(0), uniform)
    np.testing.assert_allclose(sampler.image_probabilities(1), uniform / 4 + balanced * 3 / 4)
    np.testing.assert_allclose(sampler.image_probabilities(2), balanced)


@pytest.mark.parametrize(
    'wrong', [{}, dict(epoch=1, num_samples=2), dict(epoch=-1), dict(num_samples=1.5)]
)
def test_bad_switches(wrong):
    with pytest.raises(InputError, match=r'defer_until\(\) takes either `epoch` or `num_samples`'):
        build('RepeatFactorSampler', Boxes(long_tail())).defer_until(**wrong)


def test_a_change_under_way_is_refused():
    """Workers may have drawn ahead: going on silently would put the switch at a wrong place."""
    sampler = build('RepeatFactorSampler', Boxes(long_tail()))
    running = iter(sampler)
    next(running)
    sampler.defer_until(epoch=1)
    assert sampler.stale
    with pytest.raises(InputError, match=r'mmdet_lt\.IterBasedTrainLoop'):
        next(running)
    running = iter(sampler)
    sampler.defer_until(epoch=1)  # no change
    assert not sampler.stale and next(running) >= 0


# ---- state -------------------------------------------------------------------------------------


@ALL
def test_state_brings_back_seed_and_switch(name):
    dataset = Boxes(long_tail(60))
    old = build(name, dataset, **SAMPLERS[name], seed=5)
    old.defer_until(epoch=1)
    new = build(name, Boxes(long_tail(60)), **SAMPLERS[name], seed=6)
    new.load_state_dict(old.state_dict())
    assert new.seed == 5 and stream(new, 150) == stream(old, 150)


def test_other_samplers_are_refused():
    dataset = Boxes(long_tail())
    state = build('RepeatFactorSampler', dataset, repeat_thr=0.1).state_dict()
    cases = {
        r'type was RepeatFactorSampler and is now ClassBalanced': build(
            'ClassBalancedSampler', dataset
        ),
        r"parameters was \{'repeat_thr': 0.1\} and is now \{'repeat_thr': 0.2\}": build(
            'RepeatFactorSampler', dataset, repeat_thr=0.2
        ),
        r'number of images was 400 and is now 390': build(
            'RepeatFactorSampler', Boxes(long_tail(390)), repeat_thr=0.1
        ),
        r'digest of the labels': build('RepeatFactorSampler', _swapped(), repeat_thr=0.1),
    }
    for message, sampler in cases.items():
        with pytest.raises(InputError, match=message):
            sampler.load_state_dict(state)
    switched = build('RepeatFactorSampler', dataset, repeat_thr=0.1)
    switched.defer_until(epoch=3)
    with pytest.raises(InputError, match=r"switch was None and is now \('epoch', 3\)"):
        switched.load_state_dict(state)


def _swapped():
    """The images of `long_tail` in another order."""
    return Boxes(long_tail()[::-1])


# ---- bad input ---------------------------------------------------------------------------------


@ALL
def test_data_without_a_box(name):
    for labels in ([[], []], [[-1], [-2, -1]], [[]]):
        with pytest.raises(InputError, match=r'no box in the \d images.*every image has factor 0'):
            build(name, Boxes(labels), **SAMPLERS[name])
    with pytest.raises(InputError, match='empty data set'):
        build(name, type('Nothing', (), dict(__len__=lambda s: 0))(), **SAMPLERS[name])


@ALL
def test_two_rebalancings_are_refused(name):
    balanced = ClassBalancedDataset(Boxes(long_tail(30)), 0.5)
    plain = Boxes(long_tail(30))
    marked = RepeatDataset(Boxes(long_tail(30)), 1)
    marked.rebalances = True
    inner = build('SquareRootSampler', plain)
    for stacked in (balanced, ConcatDataset([plain, plain]), marked, inner):
        if isinstance(stacked, ConcatDataset):
            stacked.datasets[1] = balanced
        with pytest.raises(InputError, match=f'{name} on top of .* would re-balance twice'):
            build(name, stacked, **SAMPLERS[name])


@ALL
def test_one_image(name):
    sampler = build(name, Boxes([[0]]), **SAMPLERS[name])
    assert set(stream(sampler, 7)) == {0} and sampler.image_probabilities().tolist() == [1.0]
    sampler.defer_until(num_samples=3)
    assert stream(sampler, 5) == [0] * 5


@ALL
def test_one_image_classes_and_absent_classes(name):
    """Every class in one image only, a hundred classes without any."""
    sampler = build(name, Boxes([[i] for i in range(8)], 108), **SAMPLERS[name])
    np.testing.assert_allclose(sampler.image_probabilities(), 1 / 8)
    assert set(stream(sampler, 8 * 20)) == set(range(8))


@pytest.mark.parametrize('seed', [-1, 0.5, 'x'])
def test_bad_seeds(seed):
    with pytest.raises(InputError, match=r'sampler\.seed.*found'):
        build('RepeatFactorSampler', Boxes([[0]]), seed=seed)


def test_statistics_of_another_data_set():
    dataset = Boxes(long_tail())

    def given(**changed):
        stats = ClassStatistics.from_dataset(dataset).to_dict()
        stats.pop('groups')
        return dict(stats, **changed)

    sampler = build('RepeatFactorSampler', dataset, class_statistics=given(), repeat_thr=0.1)
    np.testing.assert_allclose(
        sampler.factors, build('RepeatFactorSampler', dataset, repeat_thr=0.1).factors
    )
    cases = {
        'of another data set.*such as .c0.': given(classes=['x', 'y', 'z']),
        r"state 0 images with 'c2', the training set has 4": given(
            image_count=[300, 30, 0], instance_count=[400, 30, 0]
        ),
        r"state 3 images with 'c2', the training set has 4": given(
            image_count=[300, 30, 3], instance_count=[400, 30, 4]
        ),
    }
    for message, stats in cases.items():
        with pytest.raises(InputError, match=message):
            build('InstanceAwareRepeatFactorSampler', dataset, class_statistics=stats)
