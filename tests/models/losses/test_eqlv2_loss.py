"""EQLv2: values worked by hand, a slow reference from the paper over updates, limits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdet_lt import InputError
from mmdet_lt.models.losses.eqlv2_loss import EQLv2Loss, eqlv2_weights
from mmdet_lt.models.losses.running import flush

LOGITS = torch.tensor(
    [[1, -0.5, 0.2, -1], [0.3, 0.8, -0.2, 0.1], [-0.7, 0.4, 0, 1.2], [0.5, -1.5, 0.9, -0.3]],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 1, 3, 2])  # 3 is background


def bce(z, t):
    return np.maximum(z, 0) - z * t + np.log1p(np.exp(-np.abs(z)))


def reference(z, labels, state, weight, gamma=12.0, mu=0.8, alpha=4.0, objectness=True):
    """Entry by entry, from the paper; state is {'pos', 'neg', 'ratio'}, changed in place."""
    rows, columns = z.shape
    num_classes = columns - objectness
    w_neg = 1 / (1 + np.exp(-gamma * (state['ratio'] - mu)))
    w_pos = 1 + alpha * (1 - w_neg)
    if objectness:
        w_neg, w_pos = np.append(w_neg, 1.0), np.append(w_pos, 1.0)
    total, grad = 0.0, np.zeros_like(z)
    pos, neg = np.zeros(num_classes), np.zeros(num_classes)
    for i in range(rows):
        for j in range(columns):
            t = 1.0 if labels[i] == j else 0.0
            w = (w_pos[j] if t else w_neg[j]) * weight[i]
            total += w * bce(z[i, j], t)
            grad[i, j] = w * (1 / (1 + np.exp(-z[i, j])) - t)
            if j < num_classes:
                (pos if t else neg)[j] += abs(grad[i, j])
    state['pos'] += pos
    state['neg'] += neg
    state['ratio'] = state['pos'] / (state['neg'] + 1e-10)
    return total, grad


def test_hand_values_over_two_steps():
    loss = EQLv2Loss(num_classes=3)
    assert loss(LOGITS, LABELS).item() == pytest.approx(2.202590, abs=1e-6)
    ratio = torch.tensor([0.175927, 0.267574, 0.192700])
    torch.testing.assert_close(loss.pos_neg, ratio, atol=1e-6, rtol=0)
    assert loss(LOGITS, LABELS).item() == pytest.approx(1.751024, abs=1e-6)
    sums = torch.tensor([1.529569, 1.160597, 1.501025])
    torch.testing.assert_close(loss.neg_grad, sums, atol=2e-6, rtol=0)
    scores = loss.get_activation(LOGITS)[0]
    expected = torch.tensor([0.534447, 0.276004, 0.401961, 0.268941], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize('objectness', [True, False])
@pytest.mark.parametrize('num_classes', [1, 3, 80])
def test_it_follows_the_paper_over_updates(objectness, num_classes):
    rng = np.random.default_rng(num_classes)
    loss = EQLv2Loss(num_classes=num_classes, loss_weight=1.5)
    state = dict(
        pos=np.zeros(num_classes), neg=np.zeros(num_classes), ratio=np.full(num_classes, 100.0)
    )
    for step in range(6):
        rows = int(rng.integers(1, 600))  # more than one block of the engine
        z = rng.normal(0, 3, (rows, num_classes + objectness)).astype(np.float32)
        labels = rng.integers(0, num_classes + 1, rows)
        weight = rng.choice([0.0, 1.0, 0.5], rows).astype(np.float32)
        avg = [3, 7.5, torch.tensor(4.0), torch.tensor([5.0]), None, 0][step]
        tensor = torch.from_numpy(z).requires_grad_()
        out = loss(tensor, torch.from_numpy(labels), torch.from_numpy(weight), avg_factor=avg)
        out.backward()
        total, grad = reference(z.astype(np.float64), labels, state, weight, objectness=objectness)
        divisor = rows if avg is None else max(float(avg), 0) or 1.0
        assert out.item() == pytest.approx(1.5 * total / divisor, rel=1e-5)
        np.testing.assert_allclose(tensor.grad, 1.5 * grad / divisor, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(loss.pos_grad, state['pos'], rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(loss.neg_grad, state['neg'], rtol=2e-6, atol=1e-6)


def test_before_any_update_it_is_cross_entropy():
    target = torch.eye(4, dtype=torch.float64)[LABELS]
    plain = F.binary_cross_entropy_with_logits(LOGITS, target, reduction='sum')
    torch.testing.assert_close(EQLv2Loss(num_classes=3)(LOGITS, LABELS, avg_factor=1), plain)


def test_weights_at_the_centre_and_far_away():
    pos, neg = eqlv2_weights(torch.tensor([0.8, 100.0, 0.0]))
    torch.testing.assert_close(neg, torch.tensor([0.5, 1.0, 6.772e-5]), rtol=1e-3, atol=0)
    torch.testing.assert_close(pos, 1 + 4 * (1 - neg))


def test_gradient():
    loss, z = EQLv2Loss(num_classes=3).eval(), LOGITS.clone().requires_grad_()
    loss.pos_neg = torch.tensor([0.2, 0.9, 3.0])
    weight = torch.tensor([0.5, 1, 2, 0.25], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS, weight, avg_factor=2.5), z)


def test_calls_of_one_step_see_one_state():
    whole, parts = EQLv2Loss(num_classes=3), EQLv2Loss(num_classes=3)
    parts.step_driven = True
    z = LOGITS.clone().requires_grad_()
    for _ in range(3):
        expected = whole(z, LABELS, avg_factor=1)
        got = parts(z[:1], LABELS[:1], avg_factor=1) + parts(z[1:], LABELS[1:], avg_factor=1)
        torch.testing.assert_close(got, expected)
        flush([parts])
        torch.testing.assert_close(parts.pos_neg, whole.pos_neg)


def test_wrong_width_names_both_kinds_of_heads():
    with pytest.raises(InputError, match=r'5 \(dense head\) or 6 \(RoI head\).*found 4'):
        EQLv2Loss(num_classes=5)(LOGITS, LABELS)


@pytest.mark.parametrize('bad', [dict(gamma=0), dict(alpha=-1)])
def test_bad_arguments(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        EQLv2Loss(**bad)
