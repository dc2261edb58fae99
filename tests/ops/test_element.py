"""The engine of element functions against autograd over the whole matrix."""

import pytest
import torch

from mmdet_lt.ops.element import element_entries, element_loss
from mmdet_lt.ops.sigmoid import SigmoidTerms

ROWS, COLUMNS = 43, 5


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of 20, 20 and 3 rows."""
    blocks = [(0, 20), (20, 40), (40, ROWS)]
    monkeypatch.setattr('mmdet_lt.ops.element.row_blocks', lambda z: blocks)


def cubic(z, target):
    """An element function with a derivative that is easy to see."""
    return (z - target) ** 3, 3 * (z - target) ** 2


def problem(dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, COLUMNS, generator=random, dtype=torch.float64).to(dtype)
    label = torch.randint(-1, COLUMNS + 2, (ROWS,), generator=random)
    vectors = torch.rand(3, COLUMNS, generator=random, dtype=torch.float64)
    gate = torch.rand(ROWS, COLUMNS, generator=random) > 0.3
    weight = torch.rand(ROWS, generator=random, dtype=torch.float64)
    return z.requires_grad_(), label, SigmoidTerms(*vectors, gate=gate), weight


def expected(z, target, is_fg, terms, weight):
    total = 0.0
    for i in range(len(z)):
        negative = terms.neg_weight if is_fg[i] else terms.neg_weight_bg
        for j in range(z.shape[1]):
            t = target[i, j]
            w = terms.pos_weight[j] * t + negative[j] * (1 - t)
            kept = float(terms.gate[i, j]) if t == 0 else 1.0
            total = total + w * kept * weight[i] * (z[i, j] - t) ** 3
    return total


@pytest.mark.parametrize('soft', [False, True])
def test_sum_and_entries_follow_the_formula(soft):
    z, label, terms, weight = problem()
    is_fg = (label >= 0) & (label < 3)
    target = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    for i, column in enumerate(label.tolist()):
        if 0 <= column < COLUMNS:
            target[i, column] = 0.3 if soft else 1.0
    wanted = expected(z, target, is_fg, terms, weight)
    (wanted_grad,) = torch.autograd.grad(wanted, z)
    given = target if soft else None
    out = element_loss(z, label, is_fg, terms, cubic, weight, given)
    torch.testing.assert_close(out, wanted)
    (grad,) = torch.autograd.grad(3 * out, z, retain_graph=True)
    torch.testing.assert_close(grad, 3 * wanted_grad)
    torch.testing.assert_close(torch.autograd.grad(out, z)[0], wanted_grad)  # a second time
    for form in (weight, weight[:, None].expand(ROWS, COLUMNS)):
        entries = element_entries(z, target, is_fg, terms, cubic, form)
        assert entries.shape == z.shape
        torch.testing.assert_close(entries.sum(), wanted)
        torch.testing.assert_close(torch.autograd.grad(entries.sum(), z)[0], wanted_grad)
        torch.testing.assert_close(element_loss(z, label, is_fg, terms, cubic, form, given), wanted)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    z, label, terms, weight = problem(dtype)
    is_fg = (label >= 0) & (label < 3)
    out = element_loss(z, label, is_fg, terms, cubic, weight)
    assert out.dtype == torch.float32
    exact = element_loss(z.detach().double(), label, is_fg, terms, cubic, weight)
    assert out.item() == pytest.approx(exact.item(), rel=1e-4)
    out.backward()
    assert z.grad.dtype == dtype


def test_without_gradient_none_is_made():
    z, label, terms, weight = problem()
    called = []

    def element(z, target):
        called.append(len(z))
        return cubic(z, target)

    with torch.no_grad():
        out = element_loss(z, label, label >= 0, terms, element, weight)
    assert not out.requires_grad
    assert called == [20, 20, 3]
