"""BalancedSigmoidLoss: hand values, a slow reference, limits and the contract."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sigmoid_toys import (
    LABELS,
    LOGITS,
    bce,
    build,
    check_checkpoint,
    check_edges,
    check_gradient_and_reductions,
    check_ignored_rows,
    check_no_sync,
    random_rows,
)

from mmdet_lt.models.losses.balanced_sigmoid_loss import balanced_sigmoid_loss, prior_log_odds


def slow_balanced(z, labels, frequency, weight):
    """From the paper: foreground rows are trained with the log-odds of the prior added."""
    total = 0.0
    for i, row in enumerate(z.tolist()):
        for j, value in enumerate(row):
            if labels[i] < len(row):
                value -= math.log((1 - frequency[j]) / frequency[j])
            total += float(weight[i]) * bce(value, float(labels[i] == j))
    return total


def test_hand_values():
    loss = build('BalancedSigmoidLoss')
    assert loss(LOGITS[:, :3], LABELS).item() == pytest.approx(5.020529, abs=1e-6)
    # f = 0.01, 0.001, 0.0001
    expected = torch.tensor([-math.log(99), -math.log(999), -math.log(9999)])
    torch.testing.assert_close(loss.log_odds, expected)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 300), num_classes=st.integers(1, 12), seed=st.integers(0, 99))
def test_follows_the_paper(rows, num_classes, seed):
    z, labels, weight = random_rows(seed, rows, num_classes, num_classes)
    counts = np.random.default_rng(seed).integers(1, 900, num_classes)
    log_odds = torch.from_numpy(prior_log_odds(counts, 1000))
    expected = slow_balanced(z, labels, counts / 1000, weight)
    got = balanced_sigmoid_loss(z, labels, log_odds, weight)
    assert got.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
    loss = build('BalancedSigmoidLoss', tuple(counts), num_images=1000, loss_weight=1.5)
    got = loss(z, labels, weight, avg_factor=7)
    # Log-odds are stored in float32.
    assert got.item() == pytest.approx(1.5 * expected / 7, rel=1e-6, abs=1e-12)


def test_classes_in_no_image_and_in_every_image_have_finite_log_odds():
    odds = prior_log_odds(np.array([0, 1, 500, 999, 1000]), 1000)
    low, high = -math.log(999), math.log(999)
    np.testing.assert_allclose(odds, [math.log(1 / 1000), low, 0, high, math.log(1000)])
    assert prior_log_odds(np.array([1]), 1) == 0


def test_classes_in_half_of_the_images_give_the_cross_entropy():
    z, labels, _ = random_rows(0, 50, 3, 3)
    loss = build('BalancedSigmoidLoss', (500, 500, 500), num_images=1000)
    torch.testing.assert_close(loss(z, labels), build('BCELoss')(z, labels))


def test_background_rows_keep_their_logits():
    z = torch.randn(50, 3)
    labels = torch.full((50,), 3)
    torch.testing.assert_close(build('BalancedSigmoidLoss')(z, labels), build('BCELoss')(z, labels))


def test_tail_classes_are_pushed_up_more_and_down_less():
    z = torch.zeros(3, 3, requires_grad=True)
    build('BalancedSigmoidLoss')(z, torch.arange(3), avg_factor=1).backward()
    up, down = -z.grad.diagonal(), z.grad[torch.tensor([1, 0, 0]), torch.tensor([0, 1, 2])]
    assert (up.diff() > 0).all() and (down.diff() < 0).all() and (up > 0.98).all()


def test_scores_are_plain_sigmoids_and_logits_are_left_alone():
    loss = build('BalancedSigmoidLoss', roi=True)
    z = LOGITS[:, :3].clone()
    loss(z, LABELS)
    assert torch.equal(z, LOGITS[:, :3])
    scores = loss.get_activation(z)
    torch.testing.assert_close(scores[:, :3], z.sigmoid())
    assert (scores[:, 3] == 0).all()


def test_contract():
    loss = build('BalancedSigmoidLoss')
    check_gradient_and_reductions(loss, 3)
    check_edges(loss, 3)
    check_ignored_rows(loss, 3)
    check_no_sync(loss, 3)
    check_checkpoint('BalancedSigmoidLoss', ('log_odds',), roi=False)
    assert loss.prior_bias() == pytest.approx(-6.90675, abs=1e-5)
