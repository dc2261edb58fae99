"""GHM-C: vector, MMDetection's at momentum 0, the average over steps, divisor, the contract."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.losses import GHMC
from mmdet.registry import MODELS
from sigmoid_toys import LABELS, LOGITS, bce, check_edges, check_ignored_rows, check_no_sync
from sigmoid_toys import random_rows as toy_rows

from mmdet_lt import InputError
from mmdet_lt.models.losses.ghmc_loss import bin_counts, bin_weights
from mmdet_lt.models.losses.running import flush


def build(**kwargs):
    return MODELS.build(
        dict(type='mmdet_lt.GHMCLoss', use_sigmoid=True) | dict(num_classes=3) | kwargs
    )


def edges(bins):
    return torch.arange(1, bins) / bins


def slow_ghm(z, labels, weight, bins, momentum, history):
    """Entry by entry; ``history`` is the list of the shares of the earlier steps."""
    cells, counts = [], np.zeros(bins)
    for i, row in enumerate(z.tolist()):
        for j, value in enumerate(row):
            t = float(int(labels[i]) == j)
            g = abs(1 / (1 + np.exp(-value)) - t)
            cell = min(int(g * bins), bins - 1)
            cells.append((cell, bce(value, t), float(weight[i])))
            counts[cell] += weight[i] > 0
    valid = counts.sum()
    # Weights of the steps: 1 - m, m (1 - m), m^2 (1 - m), ... from the newest, scaled to sum 1.
    shares = [*history, counts / max(valid, 1)]
    ages = momentum ** np.arange(len(shares))[::-1]
    share = (ages[:, None] * np.array(shares)).sum(0) / ages.sum()
    filled = (counts > 0).sum()
    total = sum(w * ce / (share[c] * filled) for c, ce, w in cells if w > 0)
    if valid:
        history.append(counts / valid)
    return total / max(valid, 1)


def test_hand_values():
    """Appendix vector: ten bins, counts 0 1 2 3 1 4 1 0 0 0."""
    z = LOGITS[:, :3]
    counts = bin_counts(z, LABELS, edges(10))
    assert counts.tolist() == [0, 1, 2, 3, 1, 4, 1, 0, 0, 0]
    beta = bin_weights(counts, torch.zeros(10), torch.zeros(()), 0.0)
    # 12 entries in 6 bins: a bin of one entry weighs 12 / (6 * 1)
    expected = [0, 2, 1, 2 / 3, 2, 1 / 2, 2, 0, 0, 0]
    torch.testing.assert_close(beta, torch.tensor(expected))
    assert build()(z, LABELS).item() == pytest.approx(0.555270, abs=1e-6)


@given(st.integers(0, 2**31 - 1), st.sampled_from([1, 3, 10, 30]))
@settings(max_examples=25, deadline=None, database=None)
def test_equals_mmdet_without_momentum(seed, bins):
    z, labels, weight = toy_rows(seed, 40, 3, 3)
    z, weight = z.float(), (weight > 0).float()
    theirs = GHMC(bins=bins, momentum=0, loss_weight=1.5)
    ours = build(bins=bins, momentum=0.0, loss_weight=1.5)
    for reduction in ('mean', 'none'):
        first, second = (z.clone().requires_grad_() for _ in range(2))
        wanted = theirs(first, labels, weight, reduction_override=reduction)
        got = ours(second, labels, weight, avg_factor=7, reduction_override=reduction)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
        wanted.sum().backward()
        got.sum().backward()
        # Theirs subtracts t from a rounded p.
        torch.testing.assert_close(second.grad, first.grad, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('momentum', [0.0, 0.75])
def test_follows_the_average_over_updates(momentum):
    loss, history = build(bins=7, momentum=momentum), []
    for step in range(6):
        z, labels, weight = toy_rows(step, 30, 3, 3)
        out = loss(z, labels, weight)
        wanted = slow_ghm(z, labels, weight, 7, momentum, history)
        assert out.item() == pytest.approx(wanted, rel=1e-5)
        share = loss.bin_share / loss.bin_norm
        ages = momentum ** np.arange(len(history))[::-1]
        expected = (ages[:, None] * np.array(history)).sum(0) / ages.sum()
        np.testing.assert_allclose(share, expected, rtol=1e-5, atol=1e-7)


def test_average_has_no_bias_at_the_start():
    """The first call with momentum equals one without; MMDetection's is 1 / (1 - m) as large."""
    z, labels, weight = toy_rows(0, 30, 3, 3)
    weight = torch.ones_like(weight)
    plain = build(bins=10)(z, labels, weight)
    torch.testing.assert_close(build(bins=10, momentum=0.75)(z, labels, weight), plain)
    biased = GHMC(bins=10, momentum=0.75)(z, labels, weight)
    torch.testing.assert_close(biased, 4 * plain, rtol=1e-5, atol=0, check_dtype=False)


def test_bins_nobody_visits_fade():
    loss = build(bins=2, momentum=0.5, num_classes=1)
    hard, easy = torch.tensor([[3.0]]), torch.tensor([[-3.0]])
    background = torch.tensor([1])
    loss(hard, background)
    assert loss.bin_share.tolist() == [0.0, 0.5]
    loss(easy, background)
    assert loss.bin_share.tolist() == [0.5, 0.25] and loss.bin_norm.item() == 0.75
    loss(torch.zeros(0, 1), torch.zeros(0, dtype=torch.long))
    assert loss.bin_share.tolist() == [0.5, 0.25]


def test_calls_and_accumulated_batches_of_a_step_count_by_their_entries():
    loss = build(bins=5, momentum=0.75)
    loss.step_driven = True
    z, labels, _ = toy_rows(0, 50, 3, 3)
    for part in (slice(0, 3), slice(3, 50)):
        loss(z[part], labels[part])
    assert not loss.bin_norm
    flush([loss])
    share = bin_counts(z, labels, edges(5)) / 150
    torch.testing.assert_close(loss.bin_share, 0.25 * share)
    loss.reset_running()
    assert not loss.bin_share.any() and not loss.bin_norm


def test_valid_entries_divide_and_avg_factor_does_not():
    loss = build().eval()
    z, labels, weight = toy_rows(1, 20, 3, 3)
    valid = (weight > 0).sum() * 3
    total = loss(z, labels, weight, reduction_override='sum')
    none = loss(z, labels, weight, reduction_override='none')
    torch.testing.assert_close(none.sum(), total)
    for avg in (None, 1, 0, 2.5, torch.tensor(9.0), torch.tensor([3.0])):
        torch.testing.assert_close(loss(z, labels, weight, avg_factor=avg), total / valid)
    matrix = weight[:, None].repeat(1, 3)
    torch.testing.assert_close(loss(z, labels, matrix), total / valid)
    matrix[:, 1] = 0
    none = loss(z, labels, matrix, reduction_override='none')
    torch.testing.assert_close(loss(z, labels, matrix), none.sum() / (matrix > 0).sum())
    with pytest.raises(ValueError, match='avg_factor'):
        loss(z, labels, avg_factor=3, reduction_override='sum')


def test_weight_is_a_factor_beside_being_a_mask():
    loss = build().eval()
    z, labels, weight = toy_rows(1, 20, 3, 3)
    mask = (weight > 0).double()
    got = loss(z, labels, weight, reduction_override='none')
    wanted = loss(z, labels, mask, reduction_override='none') * weight[:, None]
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize('momentum', [0.0, 0.75])
def test_gradient_and_soft_targets(momentum):
    loss = build(momentum=momentum)
    for step in range(3):
        loss(*toy_rows(step, 20, 3, 3))
    loss.eval()
    z, labels, weight = toy_rows(9, 9, 3, 3)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, weight), z)
    quality = torch.rand(9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, (labels, quality), weight), z)
    hard = torch.eye(4, dtype=torch.float64)[labels][:, :3]
    wanted = loss(z, labels, weight)
    for target in (hard, (labels, torch.ones(9))):
        torch.testing.assert_close(loss(z, target, weight), wanted)


def test_nan_teaches_nothing_and_is_reported():
    loss = build(momentum=0.75)
    z, labels, _ = toy_rows(0, 20, 3, 3)
    loss(z, labels)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    z[4, 1] = float('nan')
    assert loss(z, labels).isnan()
    for name, value in loss.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert loss.dropped_increments == 1
    weight = torch.ones(20)
    weight[4] = 0
    loss(z, labels, weight)  # an ignored row may hold anything
    assert loss.dropped_increments == 1 and not torch.equal(loss.bin_share, before['bin_share'])


def test_contract():
    loss = build(bins=30, momentum=0.75)
    check_ignored_rows(loss.eval(), 3)
    check_edges(loss, 3)
    check_no_sync(loss.train(), 3)
    assert set(loss.state_dict()) == {'bin_share', 'bin_norm'}
    twin = build(bins=30, momentum=0.75)
    twin.load_state_dict(loss.state_dict())
    z, labels, weight = toy_rows(3, 9, 3, 3)
    assert twin(z, labels, weight) == loss(z, labels, weight)


@pytest.mark.parametrize(
    ('kwargs', 'key'),
    [
        (dict(bins=0), 'bins'),
        (dict(bins=2.5), 'bins'),
        (dict(momentum=1.0), 'momentum'),
        (dict(momentum=-0.1), 'momentum'),
        (dict(use_sigmoid=False), 'use_sigmoid'),
        (dict(reduction='max'), 'reduction'),
    ],
)
def test_bad_arguments(kwargs, key):
    with pytest.raises(InputError, match=key):
        build(**kwargs)
