"""LOCE's equilibrium loss against the paper, hand-worked values and its limits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from static_losses import (
    LABELS,
    LOGITS,
    check_extremes,
    check_forms,
    softmax_reference,
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.loce_loss import LOCELoss, equilibrium_loss, log_score, score_sums
from mmdet_lt.models.losses.running import flush


def test_known_value():
    score = torch.tensor([0.5, 0.1, 0.01, 0.01], dtype=torch.float64)
    assert equilibrium_loss(LOGITS, LABELS, score).mean().item() == pytest.approx(
        1.907996, abs=1e-6
    )


def test_hand_worked_update_and_loss():
    """Logits 0 are scores of 1/4. Class 0 is seen twice, class 1 only with weight 0."""
    loss = LOCELoss(alpha=0.5, init_score=0.15, bg_score=0.1, num_classes=3)
    z = torch.zeros(4, 4, requires_grad=True)
    label, weight = torch.tensor([0, 0, 1, 3]), torch.tensor([1.0, 0.5, 0, 1])
    out = loss(z, label, weight, avg_factor=1)
    torch.testing.assert_close(loss.mean_score, torch.tensor([0.2, 0.15, 0.15, 0.1]))
    # The new scores sum to 0.6: probabilities 1/3, 1/4, 1/4, 1/6.
    assert out.item() == pytest.approx(1.5 * math.log(3) + math.log(6), rel=1e-6)


@settings(max_examples=25, deadline=None, database=None)
@given(
    num_classes=st.integers(1, 7),
    seed=st.integers(0, 2**31 - 1),
    alpha=st.sampled_from([0.0, 0.9]),
)
def test_follows_the_paper_over_updates(num_classes, seed, alpha):
    rng = np.random.default_rng(seed)
    loss = LOCELoss(alpha=alpha, num_classes=num_classes, loss_weight=1.5)
    score = [0.01] * (num_classes + 1)
    for avg in (None, 3, 7.5, torch.tensor([5.0])):
        number = int(rng.integers(1, 30))
        z = rng.normal(0, 2, (number, num_classes + 1))
        labels = rng.integers(0, num_classes + 1, number)
        weight = rng.choice([0.0, 1.0, 0.5], number)
        tensor = torch.from_numpy(z).requires_grad_()
        arguments = torch.from_numpy(labels), torch.from_numpy(weight)
        out = loss(tensor, *arguments, avg_factor=avg)
        out.backward()
        for c in range(num_classes):
            seen = [
                math.exp(row[c]) / sum(map(math.exp, row))
                for row, y, w in zip(z, labels, weight, strict=True)
                if y == c and w > 0
            ]
            if seen:
                score[c] = alpha * score[c] + (1 - alpha) * sum(seen) / len(seen)
        np.testing.assert_allclose(loss.mean_score, score, rtol=1e-5)
        shift = [math.log(s) for s in score]
        factor = [1.0] * (num_classes + 1)
        losses, grads = softmax_reference(z, labels, lambda y, s=shift: s, factor)
        divisor = number if avg is None else float(avg)
        total = 1.5 * (losses * weight).sum() / divisor
        assert out.item() == pytest.approx(total, rel=1e-4, abs=1e-6)
        expected = 1.5 * grads * weight[:, None] / divisor
        np.testing.assert_allclose(tensor.grad, expected, rtol=1e-3, atol=1e-6)


def test_equal_scores_give_cross_entropy():
    """Before anything was seen."""
    loss = LOCELoss(num_classes=3).eval()
    torch.testing.assert_close(loss(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS))


def test_a_score_that_underflows_stays_finite():
    loss = LOCELoss(alpha=0.0, num_classes=2)
    z = torch.tensor([[-1e4, 0.0, 0]], requires_grad=True)
    out = loss(z, torch.tensor([0]))
    out.backward()
    assert loss.mean_score[0] == 0
    assert torch.isfinite(out) and torch.isfinite(z.grad).all() and z.grad[0, 0] == -1
    assert torch.isfinite(log_score(torch.zeros(2))).all()


def test_sums_are_those_of_positive_rows():
    z = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.4, 0.4]]))
    got = score_sums(z, torch.tensor([0, 0, 2]), 2)
    torch.testing.assert_close(got, torch.tensor([[0.6, 0.0], [2.0, 0.0]]))
    got = score_sums(z, torch.tensor([0, 1, 1]), 2, torch.tensor([1.0, 0.0, 2.0]))
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.4], [1.0, 1.0]]))


def test_calls_of_one_step_are_one_mean():
    """Two accumulated batches: the scores of both, updated once, seen by the second at once."""
    loss = LOCELoss(alpha=0.5, num_classes=2)
    loss.step_driven = True
    first, second = torch.zeros(1, 3), torch.log(torch.tensor([[2.0, 1, 1]]))
    loss(first.requires_grad_(), torch.tensor([0]))
    assert torch.equal(loss.mean_score, torch.full((3,), 0.01))
    out = loss(second.requires_grad_(), torch.tensor([0]))
    mean = (1 / 3 + 1 / 2) / 2
    score = torch.tensor([0.5 * 0.01 + 0.5 * mean, 0.01, 0.01])
    torch.testing.assert_close(out, equilibrium_loss(second, torch.tensor([0]), score)[0])
    flush([loss])
    torch.testing.assert_close(loss.mean_score, score)


def test_forms_extremes_and_checkpoint():
    loss = LOCELoss(num_classes=3)
    loss(torch.randn(20, 4, requires_grad=True), torch.arange(20) % 4)
    for width in (3, 4):
        check_forms(loss.eval(), width)
    check_extremes(loss, 4)
    twin = LOCELoss().eval()
    twin.load_state_dict(loss.state_dict())
    assert twin(LOGITS, LABELS) == loss(LOGITS, LABELS)


def test_scores_are_those_of_the_logits_alone():
    loss = LOCELoss()
    assert loss.get_cls_channels(3) == 4
    torch.testing.assert_close(loss.get_activation(LOGITS), LOGITS.softmax(1))


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(alpha=1.0), 'alpha'),
        (dict(alpha=-0.1), 'alpha'),
        (dict(alpha=math.nan), 'alpha'),
        (dict(init_score=0.0), 'init_score'),
        (dict(bg_score=2), 'bg_score'),
        (dict(use_sigmoid=True), 'use_sigmoid=False'),
    ],
)
def test_bad_arguments_name_their_key(kwargs, word):
    with pytest.raises(InputError, match=word):
        LOCELoss(**kwargs)
