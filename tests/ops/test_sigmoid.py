"""The sigmoid engine against its eager form, on CPU and, where there is one, on a GPU."""

import pytest
import torch

from mmdet_lt.ops import sigmoid
from mmdet_lt.ops.sigmoid import (
    SigmoidTerms,
    sigmoid_loss_entries,
    sigmoid_terms_entries,
    sigmoid_terms_loss,
    weighted_sigmoid_loss,
)

DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 256 rows of nine columns, so that the cases below cross their edges."""
    for name in ('CPU_BLOCK_ENTRIES', 'BLOCK_ENTRIES'):
        monkeypatch.setattr(sigmoid, name, 256 * 9)


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


# ---- terms: focal exponent, gate, shift, scale, soft targets ------------------------------

#: What each test of terms tries; vectors are drawn by `terms_of`.
TERMS = {
    'plain': {},
    'background weights': dict(neg_weight_bg='vector'),
    'gamma': dict(gamma=2.0),
    'gamma below one': dict(gamma=0.5, neg_weight_bg='vector'),
    'gamma of columns': dict(gamma='vector'),
    'gate': dict(gate='gate'),
    'shift': dict(shift='vector'),
    'shift of foreground': dict(shift='vector', shift_bg='zeros'),
    'shift of both': dict(shift='vector', shift_bg='other'),
    'scale': dict(scale=2.5),
    'negative scale': dict(scale=-0.5),
    'all': dict(
        neg_weight_bg='vector',
        gamma='other',
        gate='gate',
        shift='vector',
        shift_bg='other',
        scale=1.5,
    ),
}


def terms_of(name, pos, neg, z):
    """SigmoidTerms of one entry of TERMS, with vectors of their own."""
    generator = torch.Generator().manual_seed(len(name))
    columns = z.shape[1]
    drawn = {
        'vector': torch.rand(columns, generator=generator, dtype=torch.float64) * 2,
        'other': torch.rand(columns, generator=generator, dtype=torch.float64) + 0.1,
        'zeros': torch.zeros(columns, dtype=torch.float64),
        'gate': torch.rand(z.shape, generator=generator) < 0.6,
    }
    values = {
        key: drawn[value].to(z.device) if isinstance(value, str) else value
        for key, value in TERMS[name].items()
    }
    return SigmoidTerms(pos, neg, **values)


def by_definition(z, target, is_fg, terms, weight):
    """Entries of the formula in the module's docstring, differentiable by autograd."""
    shift = 0.0 if terms.shift is None else terms.shift
    negative = terms.neg_weight
    if terms.shift_bg is not None:
        shift = torch.where(is_fg[:, None], shift, terms.shift_bg)
    if terms.neg_weight_bg is not None:
        negative = torch.where(is_fg[:, None], negative, terms.neg_weight_bg)
    x = terms.scale * z + shift
    entries = sigmoid_loss_entries(x, target)
    if terms.gamma is not None:
        entries = entries * (target - x.sigmoid()).abs().pow(terms.gamma)
    entries = entries * (target * terms.pos_weight + (1 - target) * negative)
    if terms.gate is not None:
        entries = torch.where((target == 0) & ~terms.gate, 0.0, entries)
    return entries * weight


def hard_target(z, label):
    target = torch.zeros_like(z)
    inside = (label >= 0) & (label < z.shape[1])
    target[torch.where(inside)[0], label[inside]] = 1
    return target


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('rows', [1, 256, 257, 700])
@pytest.mark.parametrize('name', TERMS)
def test_fused_terms_equal_entries_and_autograd(device, name, rows):
    z, label, pos, neg, _, weight, classes = case(device, rows)
    terms = terms_of(name, pos, neg, z)
    target, is_fg = hard_target(z.detach(), label), (label >= 0) & (label < classes)
    expected = by_definition(z, target, is_fg, terms, weight[:, None])
    entry_grad = torch.autograd.grad(expected.sum(), z)[0]
    # Column sums of |gradient|: every entry depends on its own logit only.
    sums = [(entry_grad.abs() * part).sum(0) for part in (target, 1 - target)]

    loss, pos_sum, neg_sum = sigmoid_terms_loss(z, label, terms, weight, classes)
    torch.testing.assert_close(loss, expected.sum(), rtol=1e-8, atol=1e-10)
    grad = torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(grad, entry_grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close([pos_sum, neg_sum], sums, rtol=1e-7, atol=1e-9)
    assert not pos_sum.requires_grad and not neg_sum.requires_grad

    entries, size = sigmoid_terms_entries(z, target, is_fg, terms, weight[:, None])
    torch.testing.assert_close(entries, expected, rtol=1e-8, atol=1e-10)
    grad = torch.autograd.grad(entries.sum(), z)[0]
    torch.testing.assert_close(grad, entry_grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(size, entry_grad.abs(), rtol=1e-7, atol=1e-9)
    assert not size.requires_grad


@pytest.mark.parametrize('name', TERMS)
def test_rows_without_weights_or_gradient(name):
    """Other paths of the pass: no row weight, no gradient wanted, no rows."""
    z, label, pos, neg, _, _, classes = case('cpu', 300)
    terms = terms_of(name, pos, neg, z)
    ones = torch.ones_like(label, dtype=z.dtype)
    weighted = sigmoid_terms_loss(z, label, terms, ones, classes)
    plain = sigmoid_terms_loss(z, label, terms, None, classes)
    torch.testing.assert_close(plain, weighted)
    grads = [torch.autograd.grad(out[0], z)[0] for out in (plain, weighted)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        silent = sigmoid_terms_loss(z, label, terms, None, classes)
    assert not silent[0].requires_grad
    torch.testing.assert_close(silent, plain)
    none = z.detach()[:0].requires_grad_()
    terms.gate = None if terms.gate is None else terms.gate[:0]
    loss, pos_sum, neg_sum = sigmoid_terms_loss(none, label[:0], terms, None, classes)
    loss.backward()
    assert loss.item() == 0 and not pos_sum.any() and not neg_sum.any()
    assert none.grad.shape == (0, 9)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', TERMS)
def test_soft_targets_equal_autograd(device, name):
    z, label, pos, neg, _, weight, classes = case(device, 300)
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(z.shape, generator=generator, dtype=z.dtype)
    # 0 and 1 among them, where the gate and the absence of cancellation matter.
    target = (1.4 * target - 0.2).clamp(0, 1).to(device)
    terms = terms_of(name, pos, neg, z)
    is_fg = (label >= 0) & (label < classes)
    expected = by_definition(z, target, is_fg, terms, weight[:, None])
    entries, size = sigmoid_terms_entries(z, target, is_fg, terms, weight[:, None])
    torch.testing.assert_close(entries, expected, rtol=1e-8, atol=1e-10)
    grad = torch.autograd.grad((entries * 3).sum(), z)[0] / 3
    expected_grad = torch.autograd.grad(expected.sum(), z)[0]
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(size, expected_grad.abs(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('gamma', [0.5, 1.0, 2.0])
def test_a_score_that_meets_its_soft_target_gives_nothing(gamma):
    """At p = t the factor is 0 and, up to gamma 1, without a slope; there 0 is chosen, not NaN."""
    z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(2, dtype=torch.float64)
    terms = SigmoidTerms(ones, ones, gamma=gamma)
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    entries, size = sigmoid_terms_entries(z, half, torch.tensor([True]), terms)
    entries.sum().backward()
    assert (entries == 0).all() and (z.grad == 0).all() and (size == 0).all()


@pytest.mark.parametrize('device', DEVICES)
def test_gamma_zero_is_no_gamma(device):
    z, label, pos, neg, _, weight, classes = case(device, 300)
    plain = sigmoid_terms_loss(z, label, SigmoidTerms(pos, neg), weight, classes)
    for gamma in (0.0, torch.zeros_like(pos)):
        terms = SigmoidTerms(pos, neg, gamma=gamma)
        torch.testing.assert_close(sigmoid_terms_loss(z, label, terms, weight, classes), plain)


def test_gamma_of_a_column_is_that_of_the_label_for_positives():
    """Hand-worked: all scores one half, so an entry is (1/2)^gamma log 2."""
    ones = torch.ones(3, dtype=torch.float64)
    terms = SigmoidTerms(ones, ones, gamma=torch.tensor([0.0, 1.0, 2.0]))
    z = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    loss, pos, neg = sigmoid_terms_loss(z, torch.tensor([1, 2]), terms)
    log2 = torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(loss, 2 * (1 + 1 / 2 + 1 / 4) * log2)
    # (1/2)^γ (1/2 + γ/2 log 2) of one positive and one negative each, none positive in column 0.
    size = torch.stack([ones[0] / 2, 1 / 4 + log2 / 4, 1 / 8 + log2 / 4])
    torch.testing.assert_close(pos, size * torch.tensor([0, 1, 1]))
    torch.testing.assert_close(neg, size * torch.tensor([2, 1, 1]))


def test_a_gate_drops_negative_entries_only():
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ones = torch.ones(4, dtype=torch.float64)
    label = torch.tensor([0, 2, 4])  # 4: background
    closed = SigmoidTerms(ones, ones, gate=torch.zeros(3, 4, dtype=torch.bool))
    loss, pos, neg = sigmoid_terms_loss(z, label, closed)
    loss.backward()
    assert torch.equal(z.grad != 0, hard_target(z.detach(), label) == 1)
    assert (neg == 0).all() and (pos[[0, 2]] > 0).all()


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize('gamma', [0.1, 0.5, 0.9, 2.0])
def test_saturated_logits_give_no_nan(device, dtype, gamma):
    """Below 1 the slope of p^gamma is infinite at p = 0; a chain rule would give 0 * inf."""
    sizes = [0.0, 1.0, 30.0, 90.0, 104.0, 200.0, 1e4]
    z = torch.tensor([[-v, v] for v in sizes] * 2, device=device).to(dtype).requires_grad_()
    label = torch.tensor([0] * len(sizes) + [1] * len(sizes), device=device)
    ones = torch.ones(2, device=device)
    for value in (gamma, torch.full((2,), gamma, device=device)):
        terms = SigmoidTerms(ones, ones, gamma=value)
        loss, pos, neg = sigmoid_terms_loss(z, label, terms)
        entries, size = sigmoid_terms_entries(
            z, hard_target(z.detach(), label), torch.ones_like(label, dtype=torch.bool), terms
        )
        fused = torch.autograd.grad(loss, z)[0]
        single = torch.autograd.grad(entries.sum(), z)[0]
        for values in (loss, pos, neg, entries, size, fused, single):
            assert torch.isfinite(values).all()
        torch.testing.assert_close(fused, single, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(loss, entries.sum(), rtol=1e-5, atol=1e-5)
    # Wrong and certain: the loss is the logit, the gradient 1; right and certain: neither.
    torch.testing.assert_close(fused[6].abs(), torch.ones_like(fused[6]))
    assert (fused[13] == 0).all()


def test_terms_take_no_gradient():
    z, label, pos, neg, shift, _, classes = case('cpu', 20)
    for t in (pos, neg, shift):
        t.requires_grad_()
    terms = SigmoidTerms(pos, neg, gamma=neg, shift=shift)
    loss = sigmoid_terms_loss(z, label, terms, None, classes)[0]
    entries, _ = sigmoid_terms_entries(z, hard_target(z.detach(), label), label >= 0, terms)
    for out in (loss, entries.sum()):
        grads = torch.autograd.grad(out, [z, pos, neg, shift], allow_unused=True)
        assert [g is None for g in grads] == [False, True, True, True]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_terms_in_half_precision_are_computed_in_float32(device, dtype):
    z, label, pos, neg, _, weight, classes = case(device, 300)
    z = z.detach().to(dtype).requires_grad_()
    exact = z.detach().double().requires_grad_()
    terms = terms_of('all', pos, neg, z)
    got, expected = (sigmoid_terms_loss(x, label, terms, weight, classes)[0] for x in (z, exact))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    got.backward()
    expected.backward()
    assert z.grad.dtype == dtype
    torch.testing.assert_close(z.grad, exact.grad.to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize('name', TERMS)
def test_a_second_backward_over_a_retained_graph(name):
    z, label, pos, neg, _, weight, classes = case('cpu', 300)
    terms = terms_of(name, pos, neg, z)
    loss = sigmoid_terms_loss(z, label, terms, weight, classes)[0]
    first = torch.autograd.grad(loss, z, retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(2 * loss, z)[0], 2 * first)


def test_sums_of_tiny_losses_keep_their_digits():
    """Sure negatives lose 1e-9 each; one minus a rounded score would say 0."""
    z = torch.full((300, 9), -20.0)
    ones = torch.ones(9)
    loss, _, neg = weighted_sigmoid_loss(z, torch.full((300,), -1), ones, ones)
    assert loss.item() == pytest.approx(2700 * 2.0611536e-9, rel=1e-5)
    assert neg.sum().item() == pytest.approx(2700 * 2.0611536e-9, rel=1e-5)


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
