"""FederatedLoss: the sampled set, hand values, a slow reference and the contract."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sigmoid_toys import (
    LABELS,
    LOGITS,
    build,
    check_checkpoint,
    check_edges,
    check_gradient_and_reductions,
    check_ignored_rows,
    check_no_sync,
    random_rows,
    seeded,
    slow_loss,
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.federated_loss import federated_classes, federated_loss

COUNTS = (0, 1, 4, 9, 16, 25, 36, 100)


def used_columns(loss, z, *args, seed=0, **kwargs):
    """Columns that a call gives a gradient, as a set."""
    z = z.clone().requires_grad_()
    seeded(loss, z, *args, seed=seed, reduction_override='sum', **kwargs).backward()
    return set(z.grad.abs().sum(0).nonzero()[:, 0].tolist())


def test_hand_value_on_two_columns():
    classes = torch.tensor([True, True, False])
    labels = torch.tensor([0, 1, 3, 3])
    value = federated_loss(LOGITS[:, :3], labels, classes).item() / 4
    assert value == pytest.approx(1.126122, abs=1e-6)
    # The same by the module: both places of S are taken by the classes of the labels.
    loss = build('FederatedLoss', num_sample_classes=2)
    assert loss(LOGITS[:, :3], labels).item() == pytest.approx(1.126122, abs=1e-6)
    expected = slow_loss(LOGITS[:, :3], labels, lambda i, j, t: float(j < 2)) / 4
    assert value == pytest.approx(expected)


@settings(deadline=None, max_examples=40)
@given(
    num_classes=st.integers(1, 40),
    size=st.integers(1, 60),
    num_present=st.integers(0, 40),
    seed=st.integers(0, 999),
)
def test_the_set_has_its_size_and_holds_what_is_present(num_classes, size, num_present, seed):
    generator = torch.Generator().manual_seed(seed)
    present = torch.zeros(num_classes, dtype=torch.bool)
    present[torch.randperm(num_classes, generator=generator)[:num_present]] = True
    weight = torch.rand(num_classes, generator=generator) + 0.01
    before = present.clone()
    classes = federated_classes(present, weight, size)
    assert classes[present].all() and torch.equal(present, before)
    assert int(classes.sum()) == max(int(present.sum()), min(size, num_classes))


def test_classes_are_drawn_in_proportion_to_their_weight():
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    torch.manual_seed(0)
    draws = sum(
        federated_classes(torch.zeros(4, dtype=torch.bool), weight, 1).double() for _ in range(4000)
    )
    # Standard deviation of a frequency here: at most 0.008.
    np.testing.assert_allclose(draws / 4000, weight / 10, atol=0.03)
    # Two without replacement: P(class 3 left out) = sum over ordered pairs of the others.
    w = weight.double().numpy() / 10
    left_out = sum(w[a] * w[b] / (1 - w[a]) for a in range(3) for b in range(3) if a != b)
    draws = sum(
        federated_classes(torch.zeros(4, dtype=torch.bool), weight, 2).double() for _ in range(4000)
    )
    assert draws[3] / 4000 == pytest.approx(1 - left_out, abs=0.03)


@pytest.mark.parametrize(('count', 'power'), [('image', 0.5), ('instance', 1.0), ('image', 0.0)])
def test_sampling_weight_is_a_power_of_the_count(count, power):
    instances = (0, 2, 40, 9, 160, 25, 36, 1000)
    loss = build('FederatedLoss', COUNTS, instances=instances, count=count, power=power)
    chosen = COUNTS if count == 'image' else instances
    expected = [max(n, 1) ** power for n in chosen]
    torch.testing.assert_close(loss.sampling_weight, torch.tensor(expected, dtype=torch.float32))


def test_follows_the_paper_on_the_drawn_set():
    z, _, weight = random_rows(0, 30, 8, 8)
    labels = torch.tensor([2, 8, 3] * 10)
    loss = build('FederatedLoss', COUNTS, num_sample_classes=4, loss_weight=1.5)
    sets = set()
    for seed in range(8):
        columns = used_columns(loss, z, labels, weight, seed=seed)
        assert len(columns) == 4 and {2, 3} <= columns
        sets.add(frozenset(columns))
        expected = slow_loss(z, labels, lambda i, j, t, s=columns: float(j in s), weight)
        got = seeded(loss, z, labels, weight, avg_factor=5, seed=seed)
        assert got.item() == pytest.approx(1.5 * expected / 5, rel=1e-10)
    assert len(sets) > 1  # the set is drawn anew in every call


def test_more_labels_than_places_all_count():
    labels = torch.tensor([0, 1, 2, 5, 7, 8])
    z = torch.randn(6, 8)
    loss = build('FederatedLoss', COUNTS, num_sample_classes=3)
    assert used_columns(loss, z, labels) == {0, 1, 2, 5, 7}


def test_background_takes_no_place_and_ignored_rows_force_no_class():
    z = torch.randn(6, 8)
    background = torch.full((6,), 8)
    for size in (1, 3):
        loss = build('FederatedLoss', COUNTS, num_sample_classes=size)
        assert len(used_columns(loss, z, background)) == size
    loss = build('FederatedLoss', COUNTS, num_sample_classes=1)
    labels = torch.tensor([4, 4, 0, 1, 0, 8])
    weight = torch.tensor([1.0, 1, 0, 0, 0, 1])
    assert used_columns(loss, z, labels, weight) == {4}
    assert used_columns(loss, z, labels, weight[:, None].expand(6, 8)) == {4}


def test_every_positive_soft_target_is_in_the_set():
    z = torch.randn(3, 8)
    soft = torch.zeros(3, 8)
    soft[0, 1], soft[0, 6], soft[1, 3], soft[2, 5] = 0.9, 0.2, 0.4, 1.0
    loss = build('FederatedLoss', COUNTS, num_sample_classes=1)
    assert used_columns(loss, z, soft, torch.tensor([1.0, 1.0, 0.0])) == {1, 3, 6}


def test_enough_places_for_all_classes_give_the_cross_entropy():
    loss, plain = build('FederatedLoss'), build('BCELoss')
    assert loss.num_sample_classes == 50
    torch.testing.assert_close(loss(LOGITS[:, :3], LABELS), plain(LOGITS[:, :3], LABELS))


def test_equal_seeds_draw_equal_sets():
    z, labels, _ = random_rows(1, 10, 8, 3)
    loss = build('FederatedLoss', COUNTS, num_sample_classes=6)
    values = [seeded(loss, z, labels, seed=seed).item() for seed in (1, 1, 2, 3, 4)]
    assert values[0] == values[1] and len(set(values)) > 1


def test_contract():
    for size in (50, 2):
        loss = build('FederatedLoss', num_sample_classes=size)
        check_gradient_and_reductions(loss, 3)
        check_edges(loss, 3)
        check_no_sync(loss, 3)
    # Where S is everything, or else another label of an ignored row could not be told from luck.
    check_ignored_rows(build('FederatedLoss'), 3)
    check_checkpoint('FederatedLoss', ('sampling_weight',), roi=False)
    assert build('FederatedLoss').prior_bias() == pytest.approx(-4.59512, abs=1e-5)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(num_sample_classes=0),
        dict(num_sample_classes=2.5),
        dict(power=-0.5),
        dict(count='boxes'),
    ],
)
def test_bad_arguments(kwargs):
    with pytest.raises(InputError, match=f'loss_cls.{next(iter(kwargs))}'):
        build('FederatedLoss', **kwargs)


def test_without_statistics_it_says_so():
    from mmdet.registry import MODELS

    loss = MODELS.build(dict(type='mmdet_lt.FederatedLoss', num_classes=3))
    with pytest.raises(InputError, match='FederatedLoss has no class statistics'):
        loss(LOGITS[:, :3], LABELS)
