"""The sigmoid engine against its eager form, on CPU and, where there is one, on a GPU."""

import pytest
import torch

from mmdet_lt.ops.sigmoid import sigmoid_loss_entries, weighted_sigmoid_loss

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]


def case(device, rows=700, columns=9, classes=8, scale=4.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows)
    z = scale * torch.randn(rows, columns, generator=generator, dtype=dtype)
    label = torch.randint(-1, columns + 2, (rows,), generator=generator)
    vectors = torch.rand(3, columns, generator=generator, dtype=dtype)
    weight = torch.rand(rows, generator=generator, dtype=dtype)
    moved = [t.to(device) for t in (z, label, *vectors, weight)]
    return [moved[0].requires_grad_(), *moved[1:], classes]


def eager(z, label, pos, neg_fg, neg_bg, weight, classes):
    inside = (label >= 0) & (label < z.shape[1])
    target = torch.zeros_like(z)
    target[torch.where(inside)[0], label[inside]] = 1
    is_fg = ((label >= 0) & (label < classes))[:, None]
    negative = torch.where(is_fg, neg_fg, neg_fg if neg_bg is None else neg_bg)
    entry_weight = torch.where(target == 1, pos, negative) * weight[:, None]
    loss = sigmoid_loss_entries(z, target, entry_weight).sum()
    grad = ((z.sigmoid() - target).abs() * entry_weight).detach()
    return loss, (grad * target).sum(0), (grad * (1 - target)).sum(0)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('with_background', [True, False])
@pytest.mark.parametrize('rows', [1, 256, 257, 700])
def test_fused_equals_eager(device, with_background, rows):
    z, label, pos, neg_fg, neg_bg, weight, classes = case(device, rows)
    neg_bg = neg_bg if with_background else None
    expected = eager(z, label, pos, neg_fg, neg_bg, weight, classes)
    expected_grad = torch.autograd.grad(expected[0], z)[0]
    got = weighted_sigmoid_loss(z, label, pos, neg_fg, neg_bg, weight, classes)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(got[0], z)[0], expected_grad)
    assert not got[1].requires_grad and not got[2].requires_grad


@pytest.mark.parametrize('device', DEVICES)
def test_confident_logits_keep_their_digits(device):
    """float32 must be as good as the eager float32 form against float64."""
    z, label, pos, neg_fg, neg_bg, weight, classes = case(device, scale=200.0)
    gold = eager(z, label, pos, neg_fg, neg_bg, weight, classes)
    single = [t.float() for t in (pos, neg_fg, neg_bg, weight)]
    z32 = z.detach().float()
    reference = eager(z32, label, *single, classes)
    got = weighted_sigmoid_loss(z32, label, *single, classes)
    for a, b, exact in zip(got, reference, gold, strict=True):
        allowed = 4 * (b - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (a - exact).abs().max() <= allowed


def test_unweighted_rows_and_untouched_inputs():
    z, label, pos, neg_fg, _, _, _ = case('cpu')
    before = z.detach().clone()
    ones = torch.ones(len(z), dtype=z.dtype)
    plain = weighted_sigmoid_loss(z, label, pos, neg_fg)
    weighted = weighted_sigmoid_loss(z, label, pos, neg_fg, row_weight=ones)
    for a, b in zip(plain, weighted, strict=True):
        torch.testing.assert_close(a, b)
    plain[0].backward()
    assert torch.equal(z, before)


@pytest.mark.gpu
def test_no_synchronisation_on_the_gpu():
    from mmdet_lt.models.losses.eqlv2_loss import EQLv2Loss

    loss = EQLv2Loss(num_classes=1203).cuda()
    z = torch.randn(512, 1204, device='cuda', dtype=torch.half, requires_grad=True)
    label = torch.randint(0, 1204, (512,), device='cuda')
    weight = torch.ones(512, device='cuda')
    loss(z, label, weight, avg_factor=512.0).backward()
    before = z.grad.clone()
    torch.cuda.set_sync_debug_mode('error')
    try:
        loss(z, label, weight, avg_factor=512.0).backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert torch.isfinite(z.grad).all() and not torch.equal(z.grad, before)
