"""Self-adjusting Dice: vector, the paper's fraction, limits, where it stops, the contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS
from sigmoid_toys import (
    LABELS,
    LOGITS,
    bce,
    check_edges,
    check_gradient_and_reductions,
    check_ignored_rows,
    check_no_sync,
    random_rows,
    slow_loss,
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.dice_loss import dice_element


def build(**kwargs):
    return MODELS.build(
        dict(type='mmdet_lt.DiceLoss', use_sigmoid=True) | dict(num_classes=3) | kwargs
    )


def slow_dice(alpha=1.0, smooth=1.0, bce_weight=0.0):
    def entry(z, t):
        p = 1 / (1 + math.exp(-z))
        q = (1 - p) ** alpha * p
        return 1 - (2 * q * t + smooth) / (q + t + smooth) + bce_weight * bce(z, t)

    return entry


def test_hand_values():
    """z = 0: p = 1/2, q = 1/4; a positive gives 1 - 1.5 / 2.25, a negative 1 - 1 / 1.25."""
    loss = build(bce_weight=0.0)
    total = loss(LOGITS[:, :3], LABELS, reduction_override='sum')
    assert total.item() == pytest.approx(2.759852, abs=1e-6)
    none = loss(torch.zeros(1, 3), torch.tensor([1]), reduction_override='none')
    assert none[0].tolist() == pytest.approx([0.2, 1 / 3, 0.2])
    with_bce = build()(torch.zeros(1, 3), torch.tensor([1]), reduction_override='none')
    torch.testing.assert_close(with_bce, none + math.log(2))


@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0.01, 1.0]),
    st.sampled_from([0.0, 0.7]),
)
@settings(max_examples=25, deadline=None, database=None)
def test_follows_the_paper(seed, alpha, smooth, bce_weight):
    loss = build(alpha=alpha, smooth=smooth, bce_weight=bce_weight, loss_weight=1.5)
    z, labels, weight = random_rows(seed, 9, 3, 3)
    out = loss(z, labels, weight, avg_factor=2.5)
    wanted = slow_loss(z, labels, lambda i, j, t: 1.0, weight, slow_dice(alpha, smooth, bce_weight))
    assert out.item() == pytest.approx(1.5 * wanted / 2.5, rel=1e-6)


def test_only_cross_entropy_remains_with_much_smoothing():
    loss = build(smooth=1e9)
    z, labels, _ = random_rows(0, 9, 3, 3)
    wanted = slow_loss(z, labels, lambda i, j, t: 1.0)
    assert loss(z, labels, avg_factor=1).item() == pytest.approx(wanted, rel=1e-6)


def test_where_the_paper_loss_stops_and_why_cross_entropy_is_added():
    """Without it the slope of a positive changes sign at p = 1 / (1 + α) and fades with p."""
    one = torch.ones(3, dtype=torch.float64)
    half = torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64)
    slope = dice_element(half, one)[1]
    assert slope[0] < 0 and slope[1] == 0 and slope[2] > 0
    third = torch.tensor([-0.1, 0.0, 0.1], dtype=torch.float64) - math.log(2)
    slope = dice_element(third, one, alpha=2.0)[1]
    assert slope[0] < 0 and abs(slope[1]) < 1e-12 and slope[2] > 0
    low = torch.tensor([-10.0, -11.0], dtype=torch.float64)
    slope = dice_element(low, one[:2])[1]
    assert (slope[0] / slope[1]).item() == pytest.approx(math.e, rel=1e-3)
    z = torch.linspace(-30, 30, 61, dtype=torch.float64)
    for settings_ in (dict(bce_weight=1.0), dict(alpha=0.0)):
        assert (dice_element(z, torch.ones_like(z), **settings_)[1] < 0).all()
        assert (dice_element(z, torch.zeros_like(z), **settings_)[1] > 0).all()


@pytest.mark.parametrize('kwargs', [dict(), dict(alpha=0.5, smooth=0.1, bce_weight=0.0)])
def test_contract(kwargs):
    loss = build(**kwargs)
    check_gradient_and_reductions(loss, 3)
    check_ignored_rows(loss, 3)
    check_edges(loss, 3)
    check_no_sync(loss, 3)
    assert not loss.state_dict()


@pytest.mark.parametrize(
    'kwargs', [dict(alpha=-0.1), dict(smooth=0.0), dict(smooth=-1), dict(bce_weight=-1)]
)
def test_bad_arguments(kwargs):
    with pytest.raises(InputError, match=f'loss_cls.{next(iter(kwargs))}'):
        build(**kwargs)
