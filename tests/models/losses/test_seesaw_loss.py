"""Seesaw loss against the paper, MMDetection's implementation and hand-worked values."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.losses import SeesawLoss as MMDetSeesawLoss
from static_losses import LABELS, LOGITS, check_extremes, check_forms

from mmdet_lt import InputError
from mmdet_lt.models.losses.running import flush
from mmdet_lt.models.losses.seesaw_loss import SeesawLoss, seesaw_loss


def softmax(values):
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def reference_row(z, label, samples, p=0.8, q=2.0, eps=1e-2):
    """Classes' and objectness' loss and gradient of one row, from the paper, float64."""
    num_classes = len(z) - 2
    objectness = softmax(z[-2:])
    side = 0 if label < num_classes else 1
    grad = [0.0] * num_classes + [objectness[0] - (side == 0), objectness[1] - (side == 1)]
    if side:
        return 0.0, -math.log(objectness[1]), grad
    sigma = softmax(z[:-2])
    adjusted = []
    for j in range(num_classes):
        factor = 1.0
        if j != label:
            ratio = max(samples[j], 1) / max(samples[label], 1)
            factor *= ratio**p if ratio < 1 else 1.0
            ratio = sigma[j] / max(sigma[label], eps)
            factor *= ratio**q if ratio > 1 else 1.0
        adjusted.append(z[j] + math.log(factor))
    scores = softmax(adjusted)
    for j in range(num_classes):
        grad[j] = scores[j] - (j == label)
    return -math.log(scores[label]), -math.log(objectness[0]), grad


def test_hand_worked_three_classes():
    """Logits 0 are scores of 1/3; 8 rows of class 0, 1 of class 1, none of class 2; p = 1/3."""
    z = torch.zeros(4, 5, dtype=torch.float64)
    rows = seesaw_loss(z, torch.tensor([0, 1, 2, 3]), torch.tensor([8.0, 1, 0]), p=1 / 3)
    log = math.log
    # Row 0: negatives have the factor (1/8)^(1/3) = 1/2. Rows 1 and 2: no class is rarer.
    expected = [[log(2), log(2)], [log(3), log(2)], [log(3), log(2)], [0, log(2)]]
    torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float64))


def test_hand_worked_compensation():
    """Scores 3/4 and 1/4 of two equally frequent classes: the ratio 3 counts squared."""
    z = torch.tensor([[math.log(3), 0.0, 0, 0]] * 2, dtype=torch.float64)
    rows = seesaw_loss(z, torch.tensor([0, 1]), torch.ones(2))[:, 0]
    expected = [math.log(4 / 3), math.log(1 + 3 * 9)]
    torch.testing.assert_close(rows, torch.tensor(expected, dtype=torch.float64))


def test_known_value():
    z = torch.cat([LOGITS[:, :3], torch.zeros(4, 2, dtype=torch.float64)], 1)
    rows = seesaw_loss(z, LABELS, torch.tensor([1000.0, 100, 10], dtype=torch.float64))
    assert rows[:, 0].sum().item() == pytest.approx(1.121225, abs=1e-6)


@settings(max_examples=25, deadline=None, database=None)
@given(
    num_classes=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
    p=st.sampled_from([0.0, 0.8, 2.0]),
    q=st.sampled_from([0.0, 2.0]),
    eps=st.sampled_from([1e-2, 0.5]),
)
def test_follows_the_paper_over_updates(num_classes, seed, p, q, eps):
    rng = np.random.default_rng(seed)
    loss = SeesawLoss(num_classes=num_classes, p=p, q=q, eps=eps, loss_weight=1.5)
    samples = np.zeros(num_classes + 1)
    for avg in (None, 3, 7.5, torch.tensor([5.0])):
        number = int(rng.integers(1, 25))
        z = rng.normal(0, 3, (number, num_classes + 2))
        labels = rng.integers(0, num_classes + 1, number)
        weight = rng.choice([0.0, 1.0, 0.5], number)
        tensor = torch.from_numpy(z).requires_grad_()
        arguments = torch.from_numpy(labels), torch.from_numpy(weight)
        out = loss(tensor, *arguments, avg_factor=avg)
        out.backward()
        np.add.at(samples, labels[weight > 0], 1)
        np.testing.assert_array_equal(loss.cum_samples, samples)
        parts = [
            reference_row(row, y, samples, p, q, eps) for row, y in zip(z, labels, strict=True)
        ]
        divisor = number if avg is None else float(avg)
        total = sum(w * (a + b) for w, (a, b, _) in zip(weight, parts, strict=True))
        assert out.item() == pytest.approx(1.5 * total / divisor, rel=1e-5, abs=1e-9)
        grad = np.array([g for _, _, g in parts]) * weight[:, None] * 1.5 / divisor
        np.testing.assert_allclose(tensor.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('num_classes', [1, 5, 300])
def test_equals_mmdetection_over_updates(num_classes):
    ours = SeesawLoss(num_classes=num_classes, return_dict=True, loss_weight=2.0)
    theirs = MMDetSeesawLoss(num_classes=num_classes, loss_weight=2.0)
    generator = torch.Generator().manual_seed(num_classes)
    for step in range(5):
        number = 20 + 250 * step
        z = [4 * torch.randn(number, num_classes + 2, generator=generator)]
        z.append(z[0].clone())
        label = torch.randint(0, num_classes + 1, (number,), generator=generator)
        weight = 0.1 + torch.rand(number, generator=generator)
        got, wanted = (
            module(x.requires_grad_(), label, weight, avg_factor=number / 2)
            for module, x in zip((ours, theirs), z, strict=True)
        )
        assert got.keys() == wanted.keys()
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)
        sum(got.values()).backward()
        sum(wanted.values()).backward()
        torch.testing.assert_close(z[0].grad, z[1].grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(ours.cum_samples, theirs.cum_samples)
    torch.testing.assert_close(ours.get_activation(z[0]), theirs.get_activation(z[0]))
    fresh = SeesawLoss().eval()
    fresh.load_state_dict(theirs.state_dict())
    assert fresh.get_cls_channels(num_classes) == num_classes + 2
    total = sum(ours.eval()(z[0], label).values())
    torch.testing.assert_close(2 * fresh(z[0], label), total)


def test_no_factors_give_cross_entropy():
    """With p = q = 0, and for one class whatever they are."""
    z = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    label = torch.arange(30) % 5
    rows = SeesawLoss(num_classes=4, p=0.0, q=0.0)(z, label, reduction_override='none')
    objectness = F.cross_entropy(z[:, 4:], (label == 4).long(), reduction='none')
    classes = F.cross_entropy(z[:, :4], label % 4, reduction='none') * (label < 4)
    torch.testing.assert_close(rows, classes + objectness)
    rows = SeesawLoss(num_classes=1)(z[:, :3], label % 2, reduction_override='none')
    expected = F.cross_entropy(z[:, 1:3], label % 2, reduction='none')
    torch.testing.assert_close(rows, expected)


def test_forms_and_extremes():
    """Without the compensation: a constant to the gradient, it is none to finite differences."""
    loss = SeesawLoss(num_classes=3, q=0.0)
    loss(torch.randn(20, 5, requires_grad=True), torch.arange(20) % 4)
    check_forms(loss.eval(), 5)
    check_extremes(SeesawLoss(num_classes=3).eval(), 5)


@pytest.mark.parametrize('matrix', [False, True])
def test_soft_targets_of_hard_labels(matrix):
    """The compensation of a soft row is that of its largest target."""
    loss = SeesawLoss(num_classes=3).eval()
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(5))
    label = torch.arange(12) % 4
    weight = torch.rand(12, generator=torch.Generator().manual_seed(6))
    wanted = loss(z, label, weight, reduction_override='none')
    weight = weight[:, None].repeat(1, 5) if matrix else weight
    for target in (label, torch.eye(4)[label], torch.eye(4)[label][:, :3]):
        torch.testing.assert_close(loss(z, target, weight, reduction_override='none'), wanted)


def test_waiting_rows_count_at_once():
    """The hook applies counts after the step; the loss sees its own batch before."""
    whole, driven = SeesawLoss(num_classes=3), SeesawLoss(num_classes=3)
    driven.step_driven = True
    z = 2 * torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([0] * 20 + [1] * 15 + [2, 3, 3, 2, 0])
    for part in (slice(0, 25), slice(25, 40)):
        arguments = z[part].requires_grad_(), label[part]
        torch.testing.assert_close(driven(*arguments), whole(*arguments))
        assert not driven.cum_samples.any()
    flush([driven])
    assert whole.cum_samples.tolist() == driven.cum_samples.tolist() == [21, 15, 2, 2]


def test_two_losses_in_a_dict():
    pair, single = SeesawLoss(num_classes=3, return_dict=True), SeesawLoss(num_classes=3)
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(2))
    label = torch.arange(8) % 4
    for reduction in ('mean', 'sum', 'none'):
        parts = pair(z, label, reduction_override=reduction)
        assert list(parts) == ['loss_cls_objectness', 'loss_cls_classes']
        total = single(z, label, reduction_override=reduction)
        torch.testing.assert_close(sum(parts.values()), total)
        assert parts['loss_cls_classes'].shape == total.shape
    empty = pair(z[:0], label[:0], reduction_override='none')
    assert all(part.shape == (0,) for part in empty.values())
    assert all(part.shape == () for part in pair(z[:0], label[:0]).values())


def test_predictions_are_the_best_scores():
    loss = SeesawLoss(num_classes=6)
    z = 3 * torch.randn(500, 8, generator=torch.Generator().manual_seed(3))
    predicted = loss.predict(z)
    assert torch.equal(predicted, loss.get_activation(z).argmax(1))
    assert 0 < (predicted == 6).sum() < 500


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(p=-0.1), r'loss_cls\.p`'),
        (dict(q=math.nan), r'loss_cls\.q`'),
        (dict(q=math.inf), r'loss_cls\.q`'),
        (dict(eps=0.0), r'loss_cls\.eps'),
        (dict(eps=2), r'loss_cls\.eps'),
        (dict(use_sigmoid=True), 'use_sigmoid=False'),
    ],
)
def test_bad_arguments_name_their_key(kwargs, word):
    with pytest.raises(InputError, match=word):
        SeesawLoss(**kwargs)


def test_a_dense_head_is_refused():
    loss = SeesawLoss(num_classes=3)
    assert loss.dense_columns(3) is None
    for width in (3, 4):
        with pytest.raises(InputError, match=f'expects 5 logits a row, found {width}'):
            loss(torch.zeros(2, width), torch.zeros(2, dtype=torch.long))
