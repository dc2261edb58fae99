"""EQL: a value worked by hand, a slow reference from the paper, limits, bad arguments."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdet_lt import ClassStatistics, InputError
from mmdet_lt.models.losses.eql_loss import EQLLoss, equalization_loss

LOGITS = torch.tensor(
    [[1, -0.5, 0.2], [0.3, 0.8, -0.2], [-0.7, 0.4, 0], [0.5, -1.5, 0.9]], dtype=torch.float64
)
LABELS = torch.tensor([0, 1, 3, 2])  # 3 is background


def eql(counts=(1000, 100, 10), **kwargs):
    loss = EQLLoss(**kwargs)
    names = [f'class {i}' for i in range(len(counts))]
    loss.set_class_statistics(ClassStatistics(names, counts, counts, 100_000))
    return loss


def bce(z, t):
    return np.maximum(z, 0) - z * t + np.log1p(np.exp(-np.abs(z)))


def reference(z, labels, weight, tail):
    """Sum of the loss and its gradient, entry by entry, from the paper."""
    total, grad = 0.0, np.zeros_like(z)
    num_classes = z.shape[1]
    for i, label in enumerate(labels):
        for j in range(num_classes):
            t = float(label == j)
            if label < num_classes and tail[j] and not t:
                continue
            total += weight[i] * bce(z[i, j], t)
            grad[i, j] = weight[i] * (1 / (1 + np.exp(-z[i, j])) - t)
    return total, grad


def test_hand_value():
    # Frequencies 0.01, 0.001, 0.0001: classes 1 and 2 are tail at 0.0011.
    loss = eql()
    assert loss.tail.tolist() == [0, 1, 1]
    assert loss(LOGITS, LABELS).item() == pytest.approx(1.215824, abs=1e-6)
    assert eql(lambda_=0.0001).tail.tolist() == [0, 0, 0]  # below, not at, the threshold


def test_it_follows_the_paper():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 300, 20)
    loss = eql(tuple(counts), lambda_=0.0011, loss_weight=1.5)
    z, labels = rng.normal(0, 4, (500, 20)), rng.integers(0, 21, 500)
    weight = rng.choice([0.0, 1.0, 0.5], 500)
    total, grad = reference(z, labels, weight, counts / 100_000 < 0.0011)
    x = torch.from_numpy(z).requires_grad_()
    out = loss(x, torch.from_numpy(labels), torch.from_numpy(weight), avg_factor=7)
    out.backward()
    assert out.item() == pytest.approx(1.5 * total / 7, rel=1e-9)
    np.testing.assert_allclose(x.grad, 1.5 * grad / 7, rtol=1e-9, atol=1e-12)


def test_without_tail_classes_it_is_cross_entropy():
    target = torch.eye(4, dtype=torch.float64)[LABELS][:, :3]
    plain = F.binary_cross_entropy_with_logits(LOGITS, target, reduction='sum')
    torch.testing.assert_close(eql(lambda_=0.0)(LOGITS, LABELS, avg_factor=1), plain)
    function = equalization_loss(LOGITS, LABELS, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(function, plain)


def test_gradient():
    loss, z = eql(), LOGITS.clone().requires_grad_()
    weight = torch.tensor([0.5, 1, 2, 0.25], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, LABELS, weight, avg_factor=2.5), z)
    soft = torch.softmax(LOGITS.flip(0), 1)
    assert torch.autograd.gradcheck(lambda x: loss(x, soft, weight, avg_factor=2.5), z)


@pytest.mark.parametrize('lambda_', [-0.1, 1.1])
def test_bad_threshold(lambda_):
    with pytest.raises(InputError, match='lambda_'):
        EQLLoss(lambda_=lambda_)
