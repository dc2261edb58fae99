"""EFL and EQFL: vectors, slow references over updates, limits, the scale of the statistics."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
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
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.equalized_focal_loss import equalized_focal_loss
from mmdet_lt.models.losses.running import flush


def build(num_classes=3, **kwargs):
    return MODELS.build(
        dict(type='mmdet_lt.EqualizedFocalLoss', num_classes=num_classes, use_sigmoid=True) | kwargs
    )


def slow_efl(z, labels, weight, ratio, base=2.0, alpha=0.25, scale=8.0):
    """``(loss, |gradient| (N, C))`` entry by entry, from the paper."""
    total, size = 0.0, np.zeros(z.shape)
    for i, row in enumerate(z.tolist()):
        for j, value in enumerate(row):
            gamma = base + scale * (1 - ratio[j])
            positive = int(labels[i]) == j
            p_t = 1 / (1 + math.exp(-value if positive else value))
            factor = float(weight[i]) * gamma / base
            factor *= alpha if positive else 1 - alpha
            total -= factor * (1 - p_t) ** gamma * math.log(p_t)
            slope = (1 - p_t) - gamma * p_t * math.log(p_t)
            size[i, j] = factor * (1 - p_t) ** gamma * slope
    return total, size


def slow_eqfl(z, labels, quality, ratio, base=2.0, scale=8.0):
    """Loss of the authors' quality form, and its gradient by central differences."""

    def entry(value, t, gamma):
        return gamma / base * abs(t - 1 / (1 + math.exp(-value))) ** gamma * bce(value, t)

    total, size, step = 0.0, np.zeros(z.shape), 1e-5
    for i, row in enumerate(z.tolist()):
        for j, value in enumerate(row):
            gamma = base + scale * (1 - ratio[j])
            t = float(quality[i]) if int(labels[i]) == j else 0.0
            total += entry(value, t, gamma)
            rise = entry(value + step, t, gamma) - entry(value - step, t, gamma)
            size[i, j] = abs(rise) / (2 * step)
    return total, size


def test_hand_values():
    ratio = torch.tensor([0.9, 0.3, 0.0], dtype=torch.float64)
    loss, pos, neg = equalized_focal_loss(LOGITS[:, :3], LABELS, ratio)
    assert loss.item() == pytest.approx(0.547710, abs=1e-6)
    expected = torch.tensor([0.00805815, 0.00029220, 0.00001381], dtype=torch.float64)
    torch.testing.assert_close(pos, expected, atol=1e-8, rtol=0)
    expected = torch.tensor([0.86606336, 0.19995685, 0.05854675], dtype=torch.float64)
    torch.testing.assert_close(neg, expected, atol=1e-8, rtol=0)


def test_first_call_is_the_focal_loss_and_teaches_the_ratio():
    """Focal loss of the 3 x 4 example is 1.252489; gradients worked by hand for one entry."""
    loss = build()
    assert loss(LOGITS[:, :3], LABELS, reduction_override='sum').item() == pytest.approx(
        1.252489, abs=1e-6
    )
    # Row 0, column 0, a positive: p = 0.731059, (1-p)^2 (1 - p - 2 p log p) / 4 = 0.013145
    assert loss.pos_grad[0].item() == pytest.approx(0.013145, abs=1e-6)
    torch.testing.assert_close(loss.pos_neg, loss.pos_grad / loss.neg_grad)


@pytest.mark.parametrize('objective', [dict(), dict(focal_gamma=1.5, focal_alpha=0.6)])
def test_follows_the_paper_over_updates(objective):
    rng = np.random.default_rng(1)
    loss = build(6, loss_weight=1.5, scale_factor=4.0, **objective)
    base, alpha = objective.get('focal_gamma', 2.0), objective.get('focal_alpha', 0.25)
    pos, neg, ratio = np.zeros(6), np.zeros(6), np.ones(6)
    for step in range(5):
        z, labels, weight = random_rows(step, int(rng.integers(1, 300)), 6, 6)
        avg = [3, 7.5, torch.tensor(4.0), torch.tensor([5.0]), 0][step]
        z.requires_grad_()
        out = loss(z, labels, weight, avg_factor=avg)
        out.backward()
        total, size = slow_efl(z, labels, weight, ratio, base, alpha, 4.0)
        factor = 1.5 / (float(avg) or 1.0)
        assert out.item() == pytest.approx(factor * total, rel=1e-5)
        np.testing.assert_allclose(z.grad.abs(), factor * size, rtol=1e-4, atol=1e-9)
        hot = np.eye(7)[labels][:, :6]
        pos += factor * (size * hot).sum(0)
        neg += factor * (size * (1 - hot)).sum(0)
        ratio = np.clip(pos / (neg + 1e-10), 0, 1)
        np.testing.assert_allclose(loss.pos_grad, pos, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(loss.neg_grad, neg, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(loss.pos_neg, ratio, rtol=1e-5, atol=1e-9)


def test_statistics_are_the_gradients_that_reach_the_classifier():
    """Summed |gradient| of the returned loss, whatever the divisor."""
    for avg in (0.5, 20, torch.tensor(9.0)):
        loss = build(loss_weight=2.0)
        z = LOGITS[:, :3].clone().requires_grad_()
        loss(z, LABELS, avg_factor=avg).backward()
        seen = loss.pos_grad + loss.neg_grad
        torch.testing.assert_close(seen, z.grad.abs().sum(0).float())


@pytest.mark.parametrize('seed', range(3))
def test_quality_targets_are_the_equalized_quality_focal_loss(seed):
    loss = build(4, focal_alpha=None)
    loss.pos_neg = torch.tensor([1.0, 0.7, 0.2, 0.0])
    z, labels, _ = random_rows(seed, 25, 4, 4)
    quality = torch.rand(25, dtype=torch.float64) * 0.9 + 0.1
    ratio = loss.pos_neg.tolist()
    z.requires_grad_()
    out = loss(z, (labels, quality), avg_factor=2)
    total, size = slow_eqfl(z.detach(), labels, quality, ratio)
    assert out.item() == pytest.approx(total / 2, rel=1e-6)
    out.backward()
    np.testing.assert_allclose(z.grad.abs(), size / 2, rtol=1e-4, atol=1e-7)
    # The labelled column counts as positive with its whole gradient.
    hot = np.eye(5)[labels][:, :4]
    np.testing.assert_allclose(loss.pos_grad, (size * hot).sum(0) / 2, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss.neg_grad, (size * (1 - hot)).sum(0) / 2, rtol=1e-4, atol=1e-6)


@given(st.integers(0, 2**31 - 1), st.sampled_from([0.0, 0.5, 2.0, 5.0]))
@settings(max_examples=20, deadline=None, database=None)
def test_without_growth_it_is_the_focal_loss(seed, gamma):
    gamma = gamma or 0.1
    z, labels, weight = random_rows(seed, 7, 4, 4)
    loss = build(4, scale_factor=0.0, focal_gamma=gamma)
    loss.pos_neg = torch.rand(4)
    wanted = py_sigmoid_focal_loss(
        z, torch.eye(5, dtype=z.dtype)[labels][:, :4], weight, gamma, 0.25, 'sum'
    )
    got = loss(z, labels, weight, reduction_override='sum')
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-9)


def test_a_class_that_only_loses_is_focused_most():
    """Positives of class 0 only: the others' ratio is 0, their exponent γ_b + s."""
    loss = build()
    z = torch.zeros(4, 3, dtype=torch.float64)
    loss(z, torch.zeros(4, dtype=torch.long), avg_factor=1)
    assert loss.pos_neg.tolist() == [1.0, 0.0, 0.0]
    none = loss.eval()(z, torch.full((4,), 3), reduction_override='none')[0]
    focal = 0.75 * 0.5**2 * math.log(2)
    focused = 0.75 * 5 * 0.5**10 * math.log(2)
    torch.testing.assert_close(none, torch.tensor([focal, focused, focused]).double())


def test_levels_of_one_step_share_one_state():
    whole, parts = build(), build()
    whole.step_driven = parts.step_driven = True
    z = LOGITS[:, :3]
    for _ in range(3):
        wanted = whole(z, LABELS, avg_factor=3)
        got = parts(z[:1], LABELS[:1], avg_factor=3) + parts(z[1:], LABELS[1:], avg_factor=3)
        torch.testing.assert_close(got, wanted)
        flush([whole, parts])
        torch.testing.assert_close(parts.pos_neg, whole.pos_neg)
    assert (whole.pos_neg < 1).all()
    parts.reset_running()
    assert parts.pos_neg.tolist() == [1.0] * 3 and not parts.pos_grad.any()


def test_contract():
    loss = build().eval()
    loss.pos_neg = torch.tensor([0.9, 0.3, 0.0])
    check_gradient_and_reductions(loss, 3)
    check_ignored_rows(loss, 3)
    check_edges(loss, 3)
    check_no_sync(loss.train(), 3)


@pytest.mark.parametrize(
    ('kwargs', 'key'),
    [
        (dict(focal_gamma=0), 'focal_gamma'),
        (dict(scale_factor=-1), 'scale_factor'),
        (dict(focal_alpha=1.0), 'focal_alpha'),
        (dict(focal_alpha=-1), 'focal_alpha'),
    ],
)
def test_bad_arguments(kwargs, key):
    with pytest.raises(InputError, match=f'loss_cls.{key}'):
        build(**kwargs)
