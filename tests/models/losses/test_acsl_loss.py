"""ACSLLoss: hand values, the draw of background rows, a slow reference and the contract."""

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
from mmdet_lt.models.losses.acsl_loss import acsl_gate, acsl_loss, draw_rows

COUNTS = (500, 300, 50, 20, 8, 0)  # two frequent, two common, two rare
GROUP = [2, 2, 1, 1, 0, 0]
ALL = dict(group_fractions=(1, 1, 1))


def test_hand_value():
    # σ >= 0.7: row 0 in column 0, row 2 in column 3, row 3 in column 2; row 2 is background.
    loss = build('ACSLLoss', roi=True, **ALL)
    assert loss(LOGITS, LABELS).item() == pytest.approx(0.824537, abs=1e-6)
    chosen = torch.zeros(3, 4, dtype=torch.bool)
    chosen[:, 2] = True
    gate = acsl_gate(LOGITS, LABELS < 3, chosen, torch.tensor([2, 1, 0]), 0.7)
    assert acsl_loss(LOGITS, LABELS, gate, num_fg=3).item() / 4 == pytest.approx(0.824537, abs=1e-6)
    assert gate.tolist() == [
        [True, False, False, False],
        [False] * 4,
        [True, True, True, False],
        [False, False, True, False],
    ]


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 400),
    fractions=st.lists(st.sampled_from([0, 0.01, 0.1, 0.29, 1 / 3, 0.7, 1]), min_size=1),
    seed=st.integers(0, 999),
)
def test_a_draw_has_the_size_that_python_computes(rows, fractions, seed):
    torch.manual_seed(seed)
    eligible = torch.rand(rows) < 0.7
    chosen = draw_rows(eligible, fractions)
    assert not (chosen & ~eligible).any()
    number = int(eligible.sum())
    assert chosen.sum(1).tolist() == [int(number * fraction) for fraction in fractions]


def test_every_row_is_drawn_equally_often_and_groups_independently():
    torch.manual_seed(0)
    eligible = torch.tensor([True] * 10 + [False] * 2)
    total, both = torch.zeros(2, 12), torch.zeros(12)
    for _ in range(3000):
        chosen = draw_rows(eligible, (0.3, 0.5))
        total += chosen
        both += chosen[0] & chosen[1]
    # Standard deviation of a frequency: at most 0.009.
    expected = torch.tensor([[0.3] * 10 + [0.0] * 2, [0.5] * 10 + [0.0] * 2])
    torch.testing.assert_close(total / 3000, expected, atol=0.04, rtol=0)
    torch.testing.assert_close(both / 3000, expected[0] / 2, atol=0.04, rtol=0)


@pytest.mark.parametrize('roi', [True, False])
@pytest.mark.parametrize('seed', range(4))
def test_follows_the_paper_on_the_drawn_rows(roi, seed):
    z, labels, weight = random_rows(seed, 300, 6 + roi, 6)
    loss = build('ACSLLoss', COUNTS, roi=roi, loss_weight=1.5)
    z.requires_grad_()
    out = seeded(loss, z, labels, weight, avg_factor=3, seed=seed)
    out.backward()
    kept, logits = z.grad != 0, z.detach()
    background = (labels == 6) & (weight != 0)
    number = int(background.sum())
    for column, group in enumerate(GROUP):
        # A group's columns share their rows, of a number that is exact.
        assert torch.equal(kept[background, column], kept[background, GROUP.index(group)])
        assert int(kept[background, column].sum()) == int(number * (0.01, 0.1, 1.0)[group])

    def entry_weight(i, j, t):
        if t:
            return 1.0
        if labels[i] == 6:
            return float(kept[i, j])
        return float(1 / (1 + math.exp(-logits[i, j])) >= 0.7)

    expected = slow_loss(logits, labels, entry_weight, weight)
    assert out.item() == pytest.approx(1.5 * expected / 3, rel=1e-10)


def test_ignored_background_is_neither_drawn_nor_counted():
    labels = torch.full((40,), 6)
    weight = torch.tensor([1.0] * 10 + [0.0] * 30)
    loss = build('ACSLLoss', COUNTS, group_fractions=(0.5, 0.5, 0.5))
    z = torch.randn(40, 6, requires_grad=True)
    loss(z, labels, weight, avg_factor=1).backward()
    assert (z.grad != 0).sum(0).tolist() == [5] * 6


def test_a_threshold_of_zero_and_all_background_give_the_cross_entropy():
    z, labels, _ = random_rows(0, 50, 3, 3)
    loss = build('ACSLLoss', score_thr=0.0, **ALL)
    torch.testing.assert_close(loss(z, labels), build('BCELoss')(z, labels))


def test_a_threshold_of_one_leaves_foreground_rows_their_own_class():
    z = torch.randn(20, 4, requires_grad=True)
    labels = torch.arange(20) % 3
    build('ACSLLoss', roi=True, score_thr=1.0)(z, labels).backward()
    assert torch.equal((z.grad != 0).nonzero()[:, 1], labels)


def test_scores_are_not_multiplied_by_objectness():
    loss = build('ACSLLoss', roi=True)
    assert loss.get_cls_channels(3) == 4
    torch.testing.assert_close(loss.get_activation(LOGITS), LOGITS.sigmoid())
    dense = build('ACSLLoss')
    torch.testing.assert_close(dense.get_activation(LOGITS[:, :3]), LOGITS[:, :3].sigmoid())
    assert loss.predict(LOGITS).tolist() == [0, 1, 3, 2]


def test_equal_seeds_draw_equal_rows():
    z, labels, _ = random_rows(2, 300, 7, 6)
    loss = build('ACSLLoss', COUNTS, roi=True)
    values = [seeded(loss, z, labels, seed=seed).item() for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_contract():
    for roi in (True, False):
        for kwargs in ({}, ALL):
            loss = build('ACSLLoss', roi=roi, **kwargs)
            check_gradient_and_reductions(loss, 3 + roi)
            check_edges(loss, 3 + roi)
            check_ignored_rows(loss, 3 + roi)
            check_no_sync(loss, 3 + roi)
    check_checkpoint('ACSLLoss', ('group',), roi=True)
    loss = build('ACSLLoss', COUNTS)
    assert loss.group.tolist() == GROUP
    assert loss.prior_bias() == pytest.approx(-4.59512, abs=1e-5)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(score_thr=-0.1),
        dict(score_thr=70),
        dict(group_fractions=(0.1, 1.0)),
        dict(group_fractions=(1, 10, 100)),
    ],
)
def test_bad_arguments(kwargs):
    with pytest.raises(InputError, match=f'loss_cls.{next(iter(kwargs))}'):
        build('ACSLLoss', **kwargs)
