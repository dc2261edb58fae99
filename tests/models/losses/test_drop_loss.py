"""DropLoss: hand values, the rate of dropping, a slow reference and the contract."""

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
from mmdet_lt.models.losses.drop_loss import drop_gate, drop_loss, tail_fraction

TAIL = torch.tensor([0.0, 1.0, 1.0])


@pytest.mark.parametrize(('draw', 'value'), [(0.1, 1.215824), (0.9, 0.814284)])
def test_hand_values(draw, value):
    rho = tail_fraction(LABELS, TAIL)
    assert rho.item() == pytest.approx(2 / 3)
    gate = (draw < rho) | (TAIL == 0).expand(4, 3)
    loss = drop_loss(LOGITS[:, :3], LABELS, TAIL, gate) / 4
    assert loss.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ('labels', 'weight', 'rho'),
    [
        ([0, 1, 2, 3], None, 2 / 3),
        ([0, 0, 3], None, 0.0),
        ([1, 2, 1], None, 1.0),
        ([3, 3, 3], None, 0.0),  # no foreground: see the module
        ([0, 1, 1, 1], [1.0, 1.0, 0.0, 0.0], 0.5),
        ([1, 3], [0.0, 1.0], 0.0),
    ],
)
def test_the_rate_is_the_tail_fraction_of_the_foreground(labels, weight, rho):
    weight = None if weight is None else torch.tensor(weight)
    assert tail_fraction(torch.tensor(labels), TAIL, weight).item() == pytest.approx(rho)


def test_the_gate_keeps_the_head_and_a_fraction_of_the_tail():
    tail = torch.tensor([0.0, 1.0, 1.0, 0.0])
    torch.manual_seed(0)
    gate = drop_gate(torch.zeros(20_000, 4), tail, torch.tensor(0.3))
    assert gate[:, [0, 3]].all()
    # Standard deviation of the mean of 20,000 draws: 0.003.
    torch.testing.assert_close(
        gate[:, 1:3].double().mean(0), torch.full((2,), 0.3).double(), atol=0.015, rtol=0
    )
    both = (gate[:, 1] & gate[:, 2]).double().mean().item()
    assert both == pytest.approx(0.09, abs=0.01)  # each entry has its own draw
    for rho, kept in ((0.0, 0.0), (1.0, 1.0)):
        gate = drop_gate(torch.zeros(5000, 4), tail, torch.tensor(rho))
        assert gate[:, 1:3].double().mean() == kept


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 300), seed=st.integers(0, 999))
def test_follows_the_paper_on_the_drawn_entries(rows, seed):
    z, labels, weight = random_rows(seed, rows, 5, 5)
    counts = (1000, 100, 10, 0, 200)
    tail = [n / 100_000 < 0.0011 for n in counts]
    loss = build('DropLoss', counts, loss_weight=1.5)
    z.requires_grad_()
    out = seeded(loss, z, labels, weight, avg_factor=3, seed=seed)
    out.backward()
    kept = z.grad != 0

    def entry_weight(i, j, t):
        if t or not tail[j]:
            return 1.0
        return 0.0 if labels[i] < 5 else float(kept[i, j])

    expected = slow_loss(z.detach(), labels, entry_weight, weight)
    assert out.item() == pytest.approx(1.5 * expected / 3, rel=1e-10, abs=1e-12)
    counted = weight != 0
    foreground = (labels < 5) & counted
    tail_columns = torch.tensor(tail)
    # What must be kept is kept, and foreground rows keep no negative of another tail class.
    assert kept[counted][:, ~tail_columns].all()
    own = torch.zeros(rows, 6, dtype=torch.bool).scatter_(1, labels[:, None], True)[:, :5]
    assert torch.equal(kept[foreground], (own | ~tail_columns)[foreground])


def test_only_tail_foreground_makes_it_eql():
    z, labels, _ = random_rows(1, 200, 3, 3)
    labels = labels.masked_fill(labels == 0, 1)
    torch.testing.assert_close(build('DropLoss')(z, labels), build('EQLLoss')(z, labels))


def test_no_tail_class_makes_it_cross_entropy():
    z, labels, _ = random_rows(1, 200, 3, 3)
    plain = build('BCELoss')(z, labels)
    torch.testing.assert_close(build('DropLoss', lambda_=0.0)(z, labels), plain)


def test_a_batch_without_foreground_trains_the_head_classes_only():
    z = torch.randn(300, 3, dtype=torch.float64, requires_grad=True)
    out = build('DropLoss')(z, torch.full((300,), 3), reduction_override='sum')
    out.backward()
    assert (z.grad[:, 0] > 0).all() and (z.grad[:, 1:] == 0).all()


def test_equal_seeds_drop_equal_entries():
    z, labels, _ = random_rows(2, 300, 3, 3)
    loss = build('DropLoss')
    values = [seeded(loss, z, labels, seed=seed).item() for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]


def test_contract():
    loss = build('DropLoss')
    check_gradient_and_reductions(loss, 3)
    check_edges(loss, 3)
    check_ignored_rows(loss, 3)
    check_no_sync(loss, 3)
    check_checkpoint('DropLoss', ('tail',), roi=False)
    assert loss.prior_bias() == pytest.approx(-6.90675, abs=1e-5)
    torch.testing.assert_close(loss.tail, TAIL)


@pytest.mark.parametrize('value', [-0.1, 1.1, 20])
def test_bad_arguments(value):
    with pytest.raises(InputError, match='loss_cls.lambda_'):
        build('DropLoss', lambda_=value)
