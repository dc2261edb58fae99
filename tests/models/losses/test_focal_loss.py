"""FocalLoss: hand values, mmdet's own loss, a slow reference, limits and the contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.losses import FocalLoss as ReferenceFocalLoss
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
    slow_loss,
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.focal_loss import focal_loss, logit_of_score


def focal_entry(z, t, gamma=2.0, alpha=0.25):
    """From the paper: ``-α_t (1 - p_t)^γ log p_t``."""
    p_t = 1 / (1 + math.exp(-z if t else z))
    return -(alpha if t else 1 - alpha) * (1 - p_t) ** gamma * math.log(p_t)


def test_hand_values():
    assert focal_loss(LOGITS[:, :3], LABELS).item() == pytest.approx(1.252489, abs=1e-6)
    # Scores one half: 3 positive and 9 negative entries, each 0.25 log 2 before α.
    expected = 0.25 * math.log(2) * (3 * 0.25 + 9 * 0.75)
    assert build('FocalLoss')(torch.zeros(4, 3), LABELS, avg_factor=1).item() == pytest.approx(
        expected
    )


@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (0.5, 0.9), (0.0, 0.3), (5.0, 0.5)])
def test_follows_the_paper(gamma, alpha):
    z, labels, weight = random_rows(0, 40, 6, 6)
    loss = build('FocalLoss', counts=(9,) * 6, gamma=gamma, alpha=alpha, loss_weight=2.0)
    expected = slow_loss(
        z, labels, lambda i, j, t: 1.0, weight, lambda a, b: focal_entry(a, b, gamma, alpha)
    )
    got = loss(z, labels, weight, avg_factor=3)
    assert got.item() == pytest.approx(2 * expected / 3, rel=1e-10)


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 300), num_classes=st.integers(1, 20), seed=st.integers(0, 99))
def test_equals_mmdets_loss_and_gradient(rows, num_classes, seed):
    z, labels, weight = random_rows(seed, rows, num_classes, num_classes)
    z.requires_grad_()
    ours = build('FocalLoss', counts=(5,) * num_classes)
    a = ours(z, labels, weight, avg_factor=7)
    b = ReferenceFocalLoss()(z, labels, weight, avg_factor=7)
    torch.testing.assert_close(a, b)
    gradients = [torch.autograd.grad(value, z)[0] for value in (a, b)]
    torch.testing.assert_close(*gradients)


def test_without_gamma_and_with_half_alpha_it_is_half_the_cross_entropy():
    loss = build('FocalLoss', gamma=0.0, alpha=0.5)
    expected = slow_loss(LOGITS[:, :3], LABELS, lambda i, j, t: 0.5)
    assert loss(LOGITS[:, :3], LABELS, avg_factor=1).item() == pytest.approx(expected, rel=1e-12)


def test_soft_targets_are_modulated_by_their_distance_from_the_score():
    z = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    soft = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    loss = build('FocalLoss', counts=(5, 5))(z, soft, reduction_override='none')[0]
    assert loss[0] == 0
    p = 1 / (1 + math.exp(-1))
    expected = (0.25 * 0.2 + 0.75 * 0.8) * (p - 0.2) ** 2 * bce(1.0, 0.2)
    assert loss[1].item() == pytest.approx(expected)


def test_scores_instead_of_logits_give_the_same_loss():
    z, labels, weight = random_rows(4, 20, 3, 3)
    z.requires_grad_()
    plain, activated = build('FocalLoss'), build('FocalLoss', activated=True)
    a = plain(z, labels, weight, avg_factor=2)
    b = activated(z.sigmoid(), labels, weight, avg_factor=2)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(*[torch.autograd.grad(value, z)[0] for value in (a, b)])
    torch.testing.assert_close(activated.get_activation(z.sigmoid()), plain.get_activation(z))
    torch.testing.assert_close(activated.predict(z.sigmoid()), plain.predict(z))


def test_saturated_scores_keep_finite_gradients_and_wrong_ones_show():
    scores = torch.tensor([[0.0, 1.0, 1e-40], [1.0, 0.0, 0.5]], requires_grad=True)
    out = build('FocalLoss', activated=True)(scores, torch.tensor([0, 3]), avg_factor=1)
    out.backward()
    assert torch.isfinite(out) and torch.isfinite(scores.grad).all()
    assert torch.isnan(logit_of_score(torch.tensor([1.5, -0.1]))).all()
    checked = build('FocalLoss', activated=True, detect_anomaly=True)
    with pytest.raises(InputError, match='losses'):
        checked(torch.tensor([[1.5, 0.5, 0.5]]), torch.tensor([0]))


def test_contract():
    for loss in (build('FocalLoss'), build('FocalLoss', gamma=0.5)):
        check_gradient_and_reductions(loss, 3)
        check_edges(loss, 3)
        check_ignored_rows(loss, 3)
        check_no_sync(loss, 3)
    check_checkpoint('FocalLoss', (), roi=False, num_classes=3)
    assert build('FocalLoss').prior_bias() == pytest.approx(-4.59512, abs=1e-5)


@pytest.mark.parametrize('kwargs', [dict(gamma=-1), dict(alpha=1.5), dict(alpha=-1)])
def test_bad_arguments(kwargs):
    with pytest.raises(InputError, match=f'loss_cls.{next(iter(kwargs))}'):
        build('FocalLoss', **kwargs)
