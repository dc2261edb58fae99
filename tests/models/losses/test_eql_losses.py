"""EQL and EQLv2: hand-checked vectors, slow references from the papers, the contract of heads."""

import copy
import pickle

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from mmdet_lt import ClassStatistics, InputError

LOGITS = torch.tensor(
    [[1, -0.5, 0.2, -1], [0.3, 0.8, -0.2, 0.1], [-0.7, 0.4, 0, 1.2], [0.5, -1.5, 0.9, -0.3]],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 1, 3, 2])  # 3 is background


def statistics(counts=(1000, 100, 10), num_images=100_000):
    names = [f'class {i}' for i in range(len(counts))]
    return ClassStatistics(names, counts, counts, num_images)


def build(kind, **kwargs):
    loss = MODELS.build(dict(type=f'mmdet_lt.{kind}', use_sigmoid=True, **kwargs))
    return loss


def eql(counts=(1000, 100, 10), **kwargs):
    loss = build('EQLLoss', **kwargs)
    loss.set_class_statistics(statistics(counts))
    return loss


def both(num_classes=3):
    return [eql((1000, 100, 10)[:num_classes]), build('EQLv2Loss', num_classes=num_classes)]


def bce(z, t):
    return np.maximum(z, 0) - z * t + np.log1p(np.exp(-np.abs(z)))


def reference_eqlv2(z, labels, state, weight, gamma=12.0, mu=0.8, alpha=4.0, objectness=True):
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


def test_eql_hand_value():
    loss = eql()(LOGITS[:, :3], LABELS)
    assert loss.item() == pytest.approx(1.215824, abs=1e-6)


def test_eqlv2_hand_values_over_two_steps():
    loss = build('EQLv2Loss', num_classes=3)
    assert loss(LOGITS, LABELS).item() == pytest.approx(2.202590, abs=1e-6)
    torch.testing.assert_close(
        loss.pos_neg, torch.tensor([0.175927, 0.267574, 0.192700]), atol=1e-6, rtol=0
    )
    assert loss(LOGITS, LABELS).item() == pytest.approx(1.751024, abs=1e-6)
    torch.testing.assert_close(
        loss.neg_grad, torch.tensor([1.529569, 1.160597, 1.501025]), atol=2e-6, rtol=0
    )
    scores = loss.get_activation(LOGITS)[0]
    expected = torch.tensor([0.534447, 0.276004, 0.401961, 0.268941], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize('objectness', [True, False])
@pytest.mark.parametrize('num_classes', [1, 3, 80])
def test_eqlv2_follows_the_paper_over_updates(objectness, num_classes):
    rng = np.random.default_rng(num_classes)
    loss = build('EQLv2Loss', num_classes=num_classes, loss_weight=1.5)
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
        total, grad = reference_eqlv2(
            z.astype(np.float64), labels, state, weight, objectness=objectness
        )
        divisor = rows if avg is None else max(float(avg), 0) or 1.0
        assert out.item() == pytest.approx(1.5 * total / divisor, rel=1e-5)
        np.testing.assert_allclose(tensor.grad, 1.5 * grad / divisor, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(loss.pos_grad, state['pos'], rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(loss.neg_grad, state['neg'], rtol=2e-6, atol=1e-6)


def test_eql_follows_the_paper():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 300, 20)
    loss = eql(tuple(counts), lambda_=0.0011)
    z = rng.normal(0, 4, (500, 20))
    labels = rng.integers(0, 21, 500)
    tail = counts / 100_000 < 0.0011
    expected = 0.0
    for i in range(500):
        for j in range(20):
            t = float(labels[i] == j)
            dropped = labels[i] < 20 and tail[j] and not t
            expected += 0.0 if dropped else bce(z[i, j], t)
    out = loss(torch.from_numpy(z), torch.from_numpy(labels))
    assert out.item() == pytest.approx(expected / 500, rel=1e-9)


@pytest.mark.parametrize('index', [0, 1])
def test_gradient_and_reductions_agree(index):
    loss = both()[index].eval()
    width = 3 + index
    z = torch.randn(9, width, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 3, 0, 2, 1, 3])
    weight = torch.rand(9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, weight, avg_factor=2.5), z)
    none = loss(z, labels, weight, reduction_override='none')
    total = loss(z, labels, weight, reduction_override='sum')
    assert none.shape == (9, width)
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(loss(z, labels, weight, avg_factor=4), total / 4)
    matrix = weight[:, None].expand(9, width)
    torch.testing.assert_close(loss(z, labels, matrix, avg_factor=4), total / 4)
    # One graph, two backward passes: the in-place gradient must be computed anew.
    out = loss(z, labels)
    first = torch.autograd.grad(out, z, retain_graph=True)[0].clone()
    torch.testing.assert_close(first, torch.autograd.grad(out * 2, z)[0] / 2)


@pytest.mark.parametrize('index', [0, 1])
def test_contract_edges(index):
    loss = both()[index]
    width = 3 + index
    empty = torch.zeros(0, width, requires_grad=True)
    out = loss(empty, torch.zeros(0, dtype=torch.long), torch.zeros(0), avg_factor=0)
    out.backward()
    assert out.item() == 0 and empty.grad.shape == (0, width)
    for fill in (0, 3):
        for scale in (1.0, 1e4):
            z = (scale * torch.randn(6, width)).requires_grad_()
            out = loss(z, torch.full((6,), fill))
            out.backward()
            assert torch.isfinite(out) and torch.isfinite(z.grad).all()
    z = torch.randn(6, width)
    zero = loss(z, torch.zeros(6, dtype=torch.long), torch.zeros(6), avg_factor=1)
    assert zero.item() == 0
    strange = torch.tensor([-1, 7, 3, 3, -5, 100])
    background = torch.full((6,), 3)
    other = copy.deepcopy(loss)
    assert loss(z, strange).item() == other(z, background).item()


@pytest.mark.parametrize('index', [0, 1])
def test_soft_targets_of_hard_labels_give_the_label_loss(index):
    loss = eql() if index == 0 else build('EQLv2Loss', num_classes=3)
    z = torch.randn(5, 3)
    labels = torch.tensor([0, 2, 3, 1, 3])
    soft = torch.eye(4)[labels][:, :3]
    other, third = copy.deepcopy(loss), copy.deepcopy(loss)
    hard = loss(z, labels)
    torch.testing.assert_close(hard, other(z, soft))
    torch.testing.assert_close(hard, third(z, (labels, torch.ones(5))))
    if index == 1:
        torch.testing.assert_close(loss.pos_neg, other.pos_neg)


def test_state_is_left_alone_outside_of_training():
    loss = build('EQLv2Loss', num_classes=3)
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    with torch.no_grad():
        loss(LOGITS, LABELS)
    loss(LOGITS, LABELS, reduction_override='none')
    loss.eval()(LOGITS, LABELS)
    for key, value in loss.state_dict().items():
        assert torch.equal(before[key], value), key
    loss.train()(LOGITS, LABELS)
    assert not torch.equal(before['pos_grad'], loss.pos_grad)
    twin = build('EQLv2Loss')
    twin.load_state_dict(loss.state_dict())
    assert twin(LOGITS, LABELS).item() == loss(LOGITS, LABELS).item()
    assert pickle.loads(pickle.dumps(twin))(LOGITS, LABELS) == copy.deepcopy(twin)(LOGITS, LABELS)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    for index, loss in enumerate(both()):
        z = (5 * torch.randn(300, 3 + index)).to(dtype).requires_grad_()
        labels = torch.randint(0, 4, (300,))
        exact = copy.deepcopy(loss)(z.detach().double(), labels)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = loss(z, labels)
        assert out.dtype == torch.float32
        assert out.item() == pytest.approx(exact.item(), rel=1e-5)
        out.backward()
        assert z.grad.dtype == dtype


def test_no_tensor_with_a_graph_is_kept():
    for index, loss in enumerate(both()):
        loss(torch.randn(4, 3 + index, requires_grad=True), LABELS).backward()
        copy.deepcopy(loss)
        kept = [v for v in vars(loss).values() if isinstance(v, torch.Tensor)]
        assert not [v for v in [*kept, *loss.buffers()] if v.requires_grad]


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(use_sigmoid=False), 'use_sigmoid'),
        (dict(reduction='avg'), 'reduction'),
        (dict(prior_prob=2), 'prior_prob'),
        (dict(num_classes=0), 'num_classes'),
    ],
)
def test_bad_arguments_name_their_key(kwargs, word):
    for kind in ('EQLLoss', 'EQLv2Loss'):
        with pytest.raises(InputError, match=word):
            MODELS.build(dict(type=f'mmdet_lt.{kind}', **kwargs))


def test_bad_calls_say_what_they_got():
    loss = build('EQLv2Loss', num_classes=5)
    with pytest.raises(InputError, match=r'5 \(dense head\) or 6 \(RoI head\).*found 4'):
        loss(LOGITS, LABELS)
    with pytest.raises(InputError, match='EQLLoss has no class statistics'):
        build('EQLLoss', num_classes=4)(LOGITS, LABELS)
    loss = build('EQLv2Loss', num_classes=3)
    with pytest.raises(InputError, match='reduction'):
        loss(LOGITS, LABELS, reduction_override='median')
    with pytest.raises(ValueError, match='avg_factor'):
        loss(LOGITS, LABELS, avg_factor=1, reduction_override='sum')
    with pytest.raises(InputError, match='shape'):
        loss(LOGITS, LABELS, torch.ones(3))
    with pytest.raises(InputError, match=r'soft targets \(4, 3\)'):
        loss(LOGITS, torch.zeros(4, 2))
    with pytest.raises(InputError, match='3 classes'):
        build('EQLv2Loss', num_classes=4).set_class_statistics(statistics())


def test_widths_and_scores_in_both_contexts():
    roi = [eql(), build('EQLv2Loss')]
    assert [loss.get_cls_channels(3) for loss in roi] == [3, 4]
    z = torch.randn(5, 4)
    scores = roi[0].get_activation(z[:, :3])
    assert scores.shape == (5, 4) and (scores[:, 3] == 0).all()
    torch.testing.assert_close(scores[:, :3], z[:, :3].sigmoid())
    scores = roi[1].get_activation(z)
    torch.testing.assert_close(scores[:, :3], z[:, :3].sigmoid() * (1 - z[:, 3:].sigmoid()))
    dense = [eql(), build('EQLv2Loss')]
    for loss in dense:
        torch.testing.assert_close(loss.get_activation(z[:, :3]), z[:, :3].sigmoid())
    # Confident and right: all rows of three classes and background.
    labels = torch.tensor([0, 1, 2, 3])
    sure = 20 * torch.eye(4) - 10
    assert roi[1].get_accuracy(sure, labels)['acc'] == 100
    assert roi[0].get_accuracy(sure[:, :3], labels)['acc'] == 100
    assert roi[1].get_accuracy(-sure, labels)['acc'] == 0


def test_step_driven_calls_share_one_state():
    from mmdet_lt.models.losses.running import flush

    whole, parts = build('EQLv2Loss', num_classes=3), build('EQLv2Loss', num_classes=3)
    parts.step_driven = True
    for _ in range(3):
        expected = whole(LOGITS, LABELS, avg_factor=1)
        got = parts(LOGITS[:1], LABELS[:1], avg_factor=1) + parts(
            LOGITS[1:], LABELS[1:], avg_factor=1
        )
        torch.testing.assert_close(got, expected)
        flush([parts])
        torch.testing.assert_close(parts.pos_neg, whole.pos_neg)
    flush([parts])  # a step in which the loss was never reached changes nothing
    torch.testing.assert_close(parts.pos_neg, whole.pos_neg)


def test_a_loss_can_be_moved_to_a_submodule_and_back():
    model = nn.Sequential(build('EQLv2Loss', num_classes=3))
    model[0](LOGITS, LABELS)
    assert set(model.state_dict()) == {'0.pos_grad', '0.neg_grad', '0.pos_neg'}
