"""Shared by the tests of losses that know class counts: builders, slow references, checks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS

from mmdet_lt import ClassStatistics

LOGITS = torch.tensor(
    [[1, -0.5, 0.2, -1], [0.3, 0.8, -0.2, 0.1], [-0.7, 0.4, 0, 1.2], [0.5, -1.5, 0.9, -0.3]],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 1, 3, 2])  # 3 is background
COUNTS = (1000, 100, 10)
AVG_FACTORS = (None, 3, 7.5, 0, torch.tensor(4.0), torch.tensor([5.0]))


def statistics(counts=COUNTS, image_counts=None):
    names = [f'class {i}' for i in range(len(counts))]
    images = counts if image_counts is None else image_counts
    return ClassStatistics(names, images, counts, max(images) + 1)


def build(kind, counts=COUNTS, image_counts=None, **kwargs):
    loss = MODELS.build(dict(type=f'mmdet_lt.{kind}', **kwargs))
    loss.set_class_statistics(statistics(counts, image_counts))
    return loss


def given_counts(examples=25):
    """Run a test with class counts (1 to 7 classes, some absent) and a seed."""
    counts = st.lists(st.integers(0, 60_000), min_size=1, max_size=7)
    seeds = st.integers(0, 2**31 - 1)

    def decorate(test):
        return settings(max_examples=examples, deadline=None, database=None)(
            given(counts=counts, seed=seeds)(test)
        )

    return decorate


def softmax_reference(z, labels, shift, row_factor, scale=1.0):
    """Loss and gradient of each row in plain float64; ``shift(y)`` is added to the scaled logits.

    Labels without a column have loss 0.
    """
    losses, grads = [], []
    for row, y in zip(z, labels, strict=True):
        if not 0 <= y < len(row):
            losses.append(0.0)
            grads.append([0.0] * len(row))
            continue
        x = [scale * value + b for value, b in zip(row, shift(y), strict=True)]
        top = max(x)
        total = sum(math.exp(value - top) for value in x)
        losses.append(row_factor[y] * (top + math.log(total) - x[y]))
        p = [math.exp(value - top) / total for value in x]
        grads.append([row_factor[y] * scale * (p[k] - (k == y)) for k in range(len(x))])
    return np.array(losses), np.array(grads).reshape(len(losses), -1)


def sigmoid_reference(z, labels, row_factor, gamma):
    """Loss and gradient of each entry in plain float64, the gradient by the product rule."""
    losses, grads = np.zeros(z.shape), np.zeros(z.shape)
    for i, y in enumerate(labels):
        for j, value in enumerate(z[i]):
            sign = -1.0 if y == j else 1.0  # the error of a positive is that of -z
            p = 1 / (1 + math.exp(-sign * value))
            cross_entropy = max(sign * value, 0) + math.log1p(math.exp(-abs(value)))
            losses[i, j] = row_factor[y] * p**gamma * cross_entropy
            slope = gamma * p**gamma * (1 - p) * cross_entropy + p**gamma * p
            grads[i, j] = row_factor[y] * sign * slope
    return losses, grads


def check_random_batches(loss, reference, num_columns, seed):
    """Loss and gradient of random batches; ``reference(z, labels)`` is one of those above.

    Its values are those of the buffers up to float32.
    """
    rng = np.random.default_rng(seed)
    num_classes = loss.num_classes
    for avg_factor in AVG_FACTORS:
        rows = int(rng.integers(1, 40))
        z = rng.normal(0, rng.choice([0.1, 1.0, 4.0]), (rows, num_columns))
        labels = rng.integers(0, num_classes + 1, rows)
        weight = rng.choice([0.0, 1.0, 0.5], rows)
        tensor = torch.from_numpy(z).requires_grad_()
        arguments = torch.from_numpy(labels), torch.from_numpy(weight)
        out = loss(tensor, *arguments, avg_factor=avg_factor)
        out.backward()
        losses, grads = reference(z, labels)
        divisor = rows if avg_factor is None else float(avg_factor) or 1.0
        expected = (losses.reshape(rows, -1) * weight[:, None]).sum() / divisor
        size = np.abs(losses).sum() / divisor
        assert out.item() == pytest.approx(loss.loss_weight * expected, rel=1e-5, abs=1e-6 * size)
        expected = loss.loss_weight * grads * weight[:, None] / divisor
        top = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(tensor.grad, expected, rtol=1e-4, atol=1e-5 * top + 1e-9)


def check_forms(loss, num_columns):
    """Reductions, weights of rows and entries, soft targets and labels say the same."""
    generator = torch.Generator().manual_seed(num_columns)
    num_classes = loss.num_classes
    labels = torch.arange(3 * (num_classes + 1)) % (num_classes + 1)
    rows = len(labels)
    z = torch.randn(rows, num_columns, generator=generator, dtype=torch.float64)
    weight = torch.rand(rows, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    total = loss(z, labels, weight, reduction_override='sum')
    none = loss(z, labels, weight, reduction_override='none')
    assert none.shape == ((rows, num_columns) if loss.sigmoid else (rows,))
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(loss(z, labels, weight), total / rows)
    torch.testing.assert_close(loss(z, labels, weight, avg_factor=4), total / 4)
    matrix = weight[:, None].expand(rows, num_columns)
    torch.testing.assert_close(loss(z, labels, matrix, reduction_override='sum'), total)
    soft = torch.eye(num_classes + 1, dtype=torch.float64)[labels][:, :num_classes]
    for target in (soft, (labels, torch.ones(rows, dtype=torch.float64))):
        torch.testing.assert_close(loss(z, target, weight, reduction_override='sum'), total)
        got = loss(z, target, weight, reduction_override='none')
        torch.testing.assert_close(got, none)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, weight, avg_factor=2.5), z)
    mixed = torch.rand(rows, num_classes, generator=generator, dtype=torch.float64) / num_classes
    assert torch.autograd.gradcheck(lambda x: loss(x, mixed, weight), z)
    out = loss(z, labels)
    first = torch.autograd.grad(out, z, retain_graph=True)[0].clone()
    torch.testing.assert_close(first, torch.autograd.grad(2 * out, z)[0] / 2)


def check_extremes(loss, num_columns):
    """All background, all foreground, huge logits, half precision: finite, also the gradients."""
    generator = torch.Generator().manual_seed(0)
    for fill in (0, loss.num_classes):
        labels = torch.full((6,), fill)
        for size in (1.0, 1e4):
            z = size * torch.randn(6, num_columns, generator=generator)
            z.requires_grad_()
            out = loss(z, labels)
            out.backward()
            assert torch.isfinite(out) and torch.isfinite(z.grad).all()
            # A softmax without background has nothing to say about background rows.
            silent = not loss.sigmoid and num_columns == fill
            assert (out == 0) if silent else (out > 0 or size > 1)
    zero = loss(torch.randn(6, num_columns), labels, torch.zeros(6), avg_factor=1)
    assert zero.item() == 0
    z = torch.zeros(0, num_columns, requires_grad=True)
    loss(z, torch.zeros(0, dtype=torch.long)).backward()
    assert z.grad.shape == z.shape
    for dtype in (torch.float16, torch.bfloat16):
        z = (3 * torch.randn(300, num_columns, generator=generator)).to(dtype).requires_grad_()
        labels = torch.randint(0, loss.num_classes + 1, (300,), generator=generator)
        out = loss(z, labels)
        out.backward()
        assert out.dtype == torch.float32 and z.grad.dtype == dtype
        assert out.item() == pytest.approx(loss(z.detach().double(), labels).item(), rel=1e-5)


def check_checkpoint(loss, num_columns, **kwargs):
    """A loss that only loads the checkpoint gives the same value, without statistics."""
    z = torch.randn(5, num_columns, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(5) % (loss.num_classes + 1)
    twin = MODELS.build(dict(type=f'mmdet_lt.{loss.name}', **kwargs))
    twin.load_state_dict(loss.state_dict())
    assert twin.num_classes == loss.num_classes
    assert set(loss.state_dict()) == set(loss.state_names)
    assert twin(z, labels).item() == loss(z, labels).item()


def check_switch(loss, num_columns):
    """``set_rebalancing(False)`` leaves the plain loss of the same logits."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(20, num_columns, generator=generator)
    labels = torch.arange(20) % (loss.num_classes + 1)
    on = loss(z, labels, reduction_override='none')
    loss.set_rebalancing(False)
    off = loss(z, labels, reduction_override='none')
    loss.set_rebalancing(True)
    factor = loss.balance_weight[labels]
    torch.testing.assert_close(on, off * (factor[:, None] if loss.sigmoid else factor))
    assert not torch.equal(on, off)
    assert torch.equal(on, loss(z, labels, reduction_override='none'))
