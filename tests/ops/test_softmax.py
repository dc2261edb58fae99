"""The softmax engine against cross entropy by autograd, on CPU and, where there is one, a GPU."""

import pytest
import torch
import torch.nn.functional as F

from mmdet_lt.ops import sigmoid
from mmdet_lt.ops.softmax import (
    grouped_softmax_loss,
    soft_grouped_softmax_loss,
    soft_softmax_loss,
    softmax_loss,
)

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 256 rows of nine columns, so that the cases below cross their edges."""
    for name in ('CPU_BLOCK_ENTRIES', 'BLOCK_ENTRIES'):
        monkeypatch.setattr(sigmoid, name, 256 * 9)


def case(device, rows=700, columns=9, scale=4.0, dtype=torch.float64):
    """Logits, labels (some outside), a vector of offsets and the weights of rows."""
    generator = torch.Generator().manual_seed(rows)
    z = scale * torch.randn(rows, columns, generator=generator, dtype=dtype)
    label = torch.randint(-2, columns + 2, (rows,), generator=generator)
    offset = torch.randn(columns, generator=generator, dtype=dtype)
    weight = torch.rand(rows, generator=generator, dtype=dtype)
    z, label, offset, weight = (t.to(device) for t in (z, label, offset, weight))
    return z.requires_grad_(), label, offset, weight


def eager(z, label, shift=0.0, scale=1.0):
    """Rows of cross entropy; those with a label outside have 0."""
    inside = (label >= 0) & (label < z.shape[1])
    target = label.masked_fill(~inside, -100)
    return F.cross_entropy(scale * z + shift, target, reduction='none', ignore_index=-100)


def pairwise(x, label):
    """An adjustment that depends on label and column and overwrites its block (as Seesaw's)."""
    columns = torch.arange(x.shape[1], device=x.device)
    return x.add_(0.1 * (label[:, None] - columns).to(x.dtype))


def assert_same(got, expected, z, weight):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    grad = torch.autograd.grad((got * weight).sum(), z, retain_graph=True)[0]
    expected_grad = torch.autograd.grad((expected * weight).sum(), z, retain_graph=True)[0]
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('rows', [1, 256, 257, 700])
def test_fused_equals_autograd(device, rows):
    z, label, _, weight = case(device, rows)
    assert_same(softmax_loss(z, label), eager(z, label), z, weight)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('rows', [1, 257])
@pytest.mark.parametrize('scale', [1.0, 0.5, 3.0])
def test_offsets_and_scale(device, rows, scale):
    z, label, offset, weight = case(device, rows)
    got = softmax_loss(z, label, offset, scale)
    assert_same(got, eager(z, label, offset, scale), z, weight)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('scale', [1.0, 3.0])
def test_an_adjustment_that_depends_on_the_label(device, scale):
    z, label, _, weight = case(device, 600)
    columns = torch.arange(9, device=device)
    shift = 0.1 * (label.clamp(0, 8)[:, None] - columns).to(z.dtype)
    got = softmax_loss(z, label, pairwise, scale)
    assert_same(got, eager(z, label, shift, scale), z, weight)


def test_an_adjustment_gets_scaled_logits_and_labels_in_range():
    z, label, _, _ = case('cpu', 300)
    seen = []

    def adjust(x, column):
        seen.append((x.clone(), column.clone()))
        return x

    softmax_loss(z, label, adjust, 2.0)
    torch.testing.assert_close(torch.cat([x for x, _ in seen]), 2 * z.detach())
    assert torch.equal(torch.cat([column for _, column in seen]), label.clamp(0, 8))
    assert [len(column) for _, column in seen] == [256, 44]


def test_no_gradient_flows_through_the_adjustment():
    """Factors of the scores count as constants, as in the papers that use them."""
    z, label, offset, _ = case('cpu', 20)
    offset.requires_grad_()
    loss = softmax_loss(z, label, offset).sum()
    assert torch.autograd.grad(loss, offset, allow_unused=True)[0] is None
    inside = (label >= 0) & (label < 9)
    doubled = softmax_loss(z, label, lambda x, _: 2 * x).sum()
    error = (2 * z).softmax(1) - F.one_hot(label.clamp(0, 8), 9)
    torch.testing.assert_close(torch.autograd.grad(doubled, z)[0], error * inside[:, None])


@pytest.mark.parametrize('device', DEVICES)
def test_labels_outside_give_zero_rows(device):
    z = torch.randn(4, 3, device=device, requires_grad=True)
    label = torch.tensor([-1, 3, -100, 1], device=device)
    loss = softmax_loss(z, label, lambda x, _: x + 5)
    loss.sum().backward()
    assert (loss[:3] == 0).all() and loss[3] > 0
    assert (z.grad[:3] == 0).all() and (z.grad[3] != 0).all()


@pytest.mark.parametrize('device', DEVICES)
def test_inputs_are_left_alone(device):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        z, label, offset, _ = case(device, 20, dtype=torch.float64)
        z = z.detach().to(dtype).requires_grad_()
        copies = [t.detach().clone() for t in (z, label, offset)]
        for adjust in (offset, pairwise):
            softmax_loss(z, label, adjust, 2.0).sum().backward()
            soft_softmax_loss(z, z.detach().abs(), adjust, 2.0).sum().backward()
        for now, before in zip((z, label, offset), copies, strict=True):
            assert torch.equal(now.detach(), before)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(device, dtype):
    z, label, offset, _ = case(device, 300)
    z = z.detach().to(dtype).requires_grad_()
    exact = z.detach().double().requires_grad_()
    got, expected = softmax_loss(z, label, offset, 2.0), eager(exact, label, offset, 2.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    expected.sum().backward()
    assert z.grad.dtype == dtype
    torch.testing.assert_close(z.grad, exact.grad.to(dtype), rtol=1e-2, atol=1e-6)


def test_tiny_float16_gradients_survive_the_loss_scale():
    """The stored gradient of float16 logits is float32: 1e-9 x 65536 is a float16, 1e-9 is not."""
    z = torch.tensor([[20.7, 0.0]], dtype=torch.float16, requires_grad=True)
    (65536.0 * softmax_loss(z, torch.tensor([0]))).sum().backward()
    exact = torch.tensor([[20.7, 0.0]], dtype=torch.float16).double().softmax(1)[0, 1] * 65536
    assert z.grad[0, 1].item() == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize('device', DEVICES)
def test_a_second_backward_over_a_retained_graph(device):
    z, label, _, weight = case(device, 300)
    for adjust in (None, pairwise):
        loss = (softmax_loss(z, label, adjust, 1.5) * weight).sum()
        first = torch.autograd.grad(loss, z, retain_graph=True)[0].clone()
        second = torch.autograd.grad(2 * loss, z, retain_graph=True)[0]
        torch.testing.assert_close(second, 2 * first)
        torch.testing.assert_close(torch.autograd.grad(loss, z)[0], first)


def test_gradcheck():
    z, label, offset, _ = case('cpu', 12, 5, scale=1.0)
    target = torch.rand(12, 5, dtype=torch.float64)
    for adjust in (None, offset, pairwise):
        assert torch.autograd.gradcheck(lambda x, a=adjust: softmax_loss(x, label, a, 1.5), z)
        assert torch.autograd.gradcheck(lambda x, a=adjust: soft_softmax_loss(x, target, a, 1.5), z)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('kind', ['none', 'vector', 'function'])
def test_soft_targets_of_hard_labels_give_the_hard_loss(device, kind):
    z, label, offset, weight = case(device, 300)
    adjust = dict(none=None, vector=offset, function=pairwise)[kind]
    inside = ((label >= 0) & (label < 9))[:, None]
    target = F.one_hot(label.clamp(0, 8), 9) * inside
    got = soft_softmax_loss(z, target, adjust, 1.5)
    assert_same(got, softmax_loss(z, label, adjust, 1.5), z, weight)


def test_soft_targets_mix_linearly():
    """0.3 of class 1 and 0.7 of class 2 is that share of either loss."""
    z = torch.randn(4, 3, dtype=torch.float64)
    offset = torch.tensor([0.5, -1, 2], dtype=torch.float64)
    target = torch.tensor([[0, 0.3, 0.7]] * 4, dtype=torch.float64)
    one, two = (softmax_loss(z, torch.full((4,), y), offset) for y in (1, 2))
    torch.testing.assert_close(soft_softmax_loss(z, target, offset), 0.3 * one + 0.7 * two)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_extreme_logits(device, dtype):
    z = torch.tensor([[1e4, -1e4, 0], [1e4, -1e4, 0], [0, 0, 0]], dtype=dtype, device=device)
    label = torch.tensor([0, 1, 2], device=device)
    z.requires_grad_()
    loss = softmax_loss(z, label)
    loss.sum().backward()
    expected = torch.tensor([0.0, 2e4, 3.0], dtype=dtype, device=device)
    expected[2] = expected[2].log()
    torch.testing.assert_close(loss, expected)
    expected = torch.tensor([[0, 0, 0], [1, -1, 0], [1 / 3, 1 / 3, -2 / 3]], dtype=dtype)
    torch.testing.assert_close(z.grad, expected.to(device))
    target = F.one_hot(label, 3)
    torch.testing.assert_close(soft_softmax_loss(z.detach(), target), loss.detach())


def test_columns_can_be_shut_out():
    """An offset of minus infinity removes a column from loss and gradient, without NaN."""
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 1, 2])
    offset = torch.tensor([0, 0, 0, -torch.inf], dtype=torch.float64)
    expected = F.cross_entropy(z[:, :3], label, reduction='none')
    assert_same(softmax_loss(z, label, offset), expected, z, torch.ones(3))
    assert_same(soft_softmax_loss(z, F.one_hot(label, 4), offset), expected, z, torch.ones(3))


def test_float32_is_as_exact_as_cross_entropy():
    """Confident rows have losses far below 1; the log of a rounded sum would lose them."""
    z, label, _, _ = case('cpu', 700, scale=20.0)
    gold = eager(z, label)
    single = z.detach().float()
    error = (softmax_loss(single, label) - gold).abs().max()
    peer = (eager(single, label) - gold).abs().max()
    assert error <= 2 * peer + 1e-6


def test_without_gradient_and_without_rows():
    z, label, offset, _ = case('cpu', 300)
    with torch.no_grad():
        silent = softmax_loss(z, label, offset, 2.0)
    torch.testing.assert_close(silent, softmax_loss(z, label, offset, 2.0))
    assert not silent.requires_grad
    none = z.detach()[:0].requires_grad_()
    loss = softmax_loss(none, label[:0], offset)
    loss.sum().backward()
    assert loss.shape == (0,) and none.grad.shape == (0, 9)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('rows', [1, 700])
def test_groups_of_columns_are_softmaxes_of_their_own(device, rows):
    """Against each group alone; one group has one column, one an adjustment."""
    z, _, _, _ = case(device, rows)
    sizes, adjusts = [3, 1, 5], [pairwise, None, None]
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(-1, 6, (rows, 3), generator=generator).to(device)
    weight = torch.rand(rows, 3, generator=generator, dtype=torch.float64).to(device)
    got = grouped_softmax_loss(z, labels, sizes, adjusts)
    parts = list(zip(z.split(sizes, 1), labels.T, strict=True))
    columns = torch.arange(3, device=device)
    shift = 0.1 * (labels[:, :1].clamp(0, 2) - columns).to(z.dtype)
    expected = [eager(*parts[0], shift), eager(*parts[1]), eager(*parts[2])]
    assert_same(got, torch.stack(expected, 1), z, weight)
    target = [
        F.one_hot(y.clamp(0, k - 1), k) * ((y >= 0) & (y < k))[:, None]
        for y, k in zip(labels.T, sizes, strict=True)
    ]
    soft = soft_grouped_softmax_loss(z, torch.cat(target, 1), sizes, adjusts)
    assert_same(soft, torch.stack(expected, 1), z, weight)
    first = torch.autograd.grad(got.sum(), z, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(2 * got.sum(), z)[0], 2 * first)


@pytest.mark.gpu
def test_no_synchronisation_on_the_gpu():
    z = torch.randn(512, 1204, device='cuda', dtype=torch.half, requires_grad=True)
    label = torch.randint(0, 1204, (512,), device='cuda')
    offset = torch.randn(1204, device='cuda')
    softmax_loss(z, label, offset, 2.0).sum().backward()
    before = z.grad.clone()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for adjust in (offset, pairwise):
            softmax_loss(z, label, adjust, 2.0).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert torch.isfinite(z.grad).all() and not torch.equal(z.grad, before)
