"""Gumbel cross entropy and GOL: vectors, the naive form, masks, clamp, scores, the contract."""

import math

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
from mmdet_lt.models.losses.gumbel_loss import gumbel_cross_entropy


def slow_gumbel(z, t):
    """Cross entropy of one clamped probability, from the paper."""
    u = math.exp(-min(max(z, -4.0), 10.0))
    p, rest = math.exp(-u), -math.expm1(-u)
    return -t * math.log(p) - (1 - t) * (math.log(rest) if rest < 1 else math.log1p(-p))


def everything(i, j, t):
    return 1.0


def test_hand_values():
    """Column 0 of row 0 is a positive at z = 1: -log p = 1/e; z = 0, t = 0: -log(1 - 1/e)."""
    z = torch.tensor([1.0, 0.0], dtype=torch.float64)
    loss, slope = gumbel_cross_entropy(z, torch.tensor([1.0, 0.0], dtype=torch.float64))
    expected = torch.tensor([1 / math.e, 0.4586751454], dtype=torch.float64)
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=0)
    expected = torch.tensor([-1 / math.e, 1 / (math.e - 1)], dtype=torch.float64)
    torch.testing.assert_close(slope, expected)
    full = build('GumbelLoss', roi=True, mask='none')
    assert full(LOGITS, LABELS).item() == pytest.approx(1.580454, abs=1e-6)
    classes = build('GumbelLoss', mask='none')
    assert classes(LOGITS[:, :3], LABELS).item() == pytest.approx(1.283423, abs=1e-6)


@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.booleans())
@settings(max_examples=20, deadline=None, database=None)
def test_gumbel_cross_entropy_follows_the_paper(seed, num_classes, roi):
    loss = build('GumbelLoss', (10,) * num_classes, roi=roi, mask='none', loss_weight=1.5)
    z, labels, weight = random_rows(seed, 9, num_classes + roi, num_classes)
    out = loss(z, labels, weight, avg_factor=2.5)
    wanted = slow_loss(z, labels, everything, weight, slow_gumbel)
    assert out.item() == pytest.approx(1.5 * wanted / 2.5, rel=1e-6)


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None, database=None)
def test_eql_mask_frees_tail_classes_of_foreground_negatives(seed):
    counts = (1000, 100, 10, 0, 200)
    tail = [n / 100_000 < 0.0011 for n in counts]
    loss = build('GumbelLoss', counts, mask='eql')
    z, labels, weight = random_rows(seed, 12, 5, 5)

    def entry_weight(i, j, t):
        return float(t or not tail[j] or labels[i] == 5)

    out = loss(z, labels, weight, avg_factor=1)
    wanted = slow_loss(z, labels, entry_weight, weight, slow_gumbel)
    assert out.item() == pytest.approx(wanted, rel=1e-6)


def test_drop_mask_drops_background_negatives_at_the_rate_of_head_foreground():
    """ρ = 0 drops all tail negatives of background, ρ = 1 none, ρ = 1/2 every second."""
    loss = build('GumbelLoss', lambda_=0.005)  # tail: classes 1 and 2
    z = torch.full((4000, 3), -1.0, dtype=torch.float64)
    entry = slow_gumbel(-1.0, 0.0)
    for tail_rows, kept in ((0, 0.0), (100, 1.0), (50, 0.5)):
        labels = torch.full((4000,), 3)
        labels[:100] = 0
        labels[:tail_rows] = 1
        none = seeded(loss, z, labels, reduction_override='none')
        assert not none[:100, 2].any() and none[tail_rows:100, 0].gt(0).all()
        background = none[100:]
        torch.testing.assert_close(background[:, 0], torch.full_like(background[:, 0], entry))
        dropped = background[:, 1:] == 0
        assert (~dropped).double().mean().item() == pytest.approx(kept, abs=0.03)
        left = background[:, 1:].masked_select(~dropped)
        torch.testing.assert_close(left, torch.full_like(left, entry))


def test_clamp_stops_gradients_but_not_scores():
    loss = build('GumbelLoss', mask='none')
    z = torch.tensor([[-4.5, -3.9, 9.9], [10.5, -50.0, 50.0]], requires_grad=True)
    labels = torch.tensor([0, 3])
    loss(z, labels, reduction_override='sum').backward()
    assert (z.grad != 0).tolist() == [[False, True, True], [False, False, False]]
    edge = loss(torch.tensor([[-4.0, -4.0, -4.0]]), torch.tensor([0]), reduction_override='none')
    assert edge[0].tolist() == pytest.approx([math.exp(4), 0, 0], abs=1e-5)
    deep = torch.tensor([[-4.2, 12.0, 0.0]], dtype=torch.float64)
    scores = loss.get_activation(deep)[0].tolist()
    assert scores == pytest.approx([math.exp(-math.exp(4.2)), math.exp(-math.exp(-12)), 1 / math.e])


def test_loss_of_an_untrained_classifier_is_not_clamped():
    """Bias 0 and 1,203 classes: 552 a row and a full gradient, where a clamp at 20 leaves none."""
    loss = build('GumbelLoss', (10,) * 1203, roi=True, mask='none')
    z = torch.zeros(2, 1204, dtype=torch.float64, requires_grad=True)
    out = loss(z, torch.tensor([1203, 7]))
    assert out.item() == pytest.approx(1203 * slow_gumbel(0, 0) + 1, rel=1e-6)
    out.backward()
    assert z.grad.abs().sum().item() == pytest.approx(1203 / (math.e - 1) + 1, rel=1e-6)


def test_float32_keeps_digits_at_both_ends():
    z = torch.linspace(-4, 10, 1000)
    for t in (0.0, 1.0):
        target = torch.full_like(z, t)
        exact, exact_slope = gumbel_cross_entropy(z.double(), target.double())
        loss, slope = gumbel_cross_entropy(z, target)
        torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=1e-30)
        torch.testing.assert_close(slope.double(), exact_slope, rtol=2e-5, atol=1e-30)


def test_prior_is_that_of_the_gumbel_link():
    loss = build('GumbelLoss')
    assert loss.prior_bias() == pytest.approx(-2.0, abs=1e-4)
    assert build('GumbelLoss', prior_prob=None).prior_bias() is None
    bias = torch.tensor(build('GumbelLoss', prior_prob=0.3).prior_bias())
    assert loss.link(bias).item() == pytest.approx(0.3)


def test_columns_scores_and_statistics_of_the_two_forms():
    gol, plain = build('GumbelLoss', roi=True), build('GumbelLoss', roi=True, mask='none')
    assert (gol.extra_columns, plain.extra_columns) == (0, 1)
    z = torch.randn(6, 4)
    scores = gol.get_activation(z[:, :3])
    assert scores.shape == (6, 4) and not scores[:, 3].any()
    torch.testing.assert_close(plain.get_activation(z), torch.exp(-torch.exp(-z)))
    torch.testing.assert_close(scores[:, :3], torch.exp(-torch.exp(-z[:, :3])))
    best = torch.tensor([[2.0, 0, 0, 3.0], [2.0, 0, 0, 1.0]])
    assert plain.predict(best).tolist() == [3, 0]
    assert not plain.state_dict() and not plain.tags.statistics and not plain.tags.stochastic
    assert gol.tags.statistics and gol.tags.stochastic
    with pytest.raises(InputError, match='ClassStatisticsHook'):
        type(gol)(num_classes=3)(z[:, :3], torch.zeros(6, dtype=torch.long))
    type(gol)(mask='none', num_classes=3)(z[:, :3], torch.zeros(6, dtype=torch.long))


@pytest.mark.parametrize(('mask', 'roi'), [('drop', True), ('eql', True), ('none', True)])
def test_contract(mask, roi):
    loss = build('GumbelLoss', roi=roi, mask=mask)
    width = 3 + (mask == 'none')
    check_gradient_and_reductions(loss, width)
    check_ignored_rows(loss, width)
    check_edges(loss, width)
    check_no_sync(loss, width)


def test_checkpoint():
    check_checkpoint('GumbelLoss', ('tail',), roi=False)
    check_checkpoint('GumbelLoss', (), roi=False, mask='none', num_classes=3)


@pytest.mark.parametrize(
    ('kwargs', 'key'),
    [(dict(mask='all'), 'mask'), (dict(lambda_=2), 'lambda_'), (dict(lambda_=-0.1), 'lambda_')],
)
def test_bad_arguments(kwargs, key):
    with pytest.raises(InputError, match=f'loss_cls.{key}'):
        build('GumbelLoss', **kwargs)
