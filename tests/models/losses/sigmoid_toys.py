"""Shared by the tests of single sigmoid losses: inputs, a slow loss and checks of the contract."""

import copy
import math

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_lt import ClassStatistics

LOGITS = torch.tensor(
    [[1, -0.5, 0.2, -1], [0.3, 0.8, -0.2, 0.1], [-0.7, 0.4, 0, 1.2], [0.5, -1.5, 0.9, -0.3]],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 1, 3, 2])  # 3 is background
#: Operations that make the host wait for the device.
SYNCHRONISING = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'bincount', 'equal')


def statistics(counts=(1000, 100, 10), num_images=100_000, instances=None):
    names = [f'class {i}' for i in range(len(counts))]
    return ClassStatistics(names, counts, instances or counts, num_images)


def build(kind, counts=(1000, 100, 10), roi=False, num_images=100_000, instances=None, **kwargs):
    """A loss of ``len(counts)`` classes that has its statistics."""
    loss = MODELS.build(dict(type=f'mmdet_lt.{kind}', use_sigmoid=True, **kwargs))
    if roi:
        loss.get_cls_channels(len(counts))
    loss.set_class_statistics(statistics(counts, num_images, instances))
    return loss


def bce(z, t):
    """Binary cross entropy of one entry."""
    return max(z, 0.0) - z * t + math.log1p(math.exp(-abs(z)))


def slow_loss(z, labels, entry_weight, row_weight=None, entry=bce):
    """Sum of ``entry(z_ij, t_ij)`` times ``entry_weight(i, j, t)`` and ``row_weight[i]``."""
    total = 0.0
    for i, row in enumerate(z.tolist()):
        for j, value in enumerate(row):
            t = float(int(labels[i]) == j)
            weight = 1.0 if row_weight is None else float(row_weight[i])
            total += weight * entry_weight(i, j, t) * entry(value, t)
    return total


def random_rows(seed, rows, columns, num_classes):
    """``(z, labels, weight)``, float64; some weights are 0."""
    rng = np.random.default_rng(seed)
    z = torch.from_numpy(rng.normal(0, 3, (rows, columns)))
    labels = torch.from_numpy(rng.integers(0, num_classes + 1, rows))
    return z, labels, torch.from_numpy(rng.choice([0.0, 0.5, 1.0], rows))


def seeded(loss, *args, seed=0, **kwargs):
    """The loss of a call that starts from a fixed state of the random generator."""
    torch.manual_seed(seed)
    return loss(*args, **kwargs)


class NoSync(TorchDispatchMode):
    """Fails at an operation that would make the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(word in name for word in SYNCHRONISING), name
        if name in ('index', 'index_put_') and len(args) > 1:
            kinds = [index.dtype for index in args[1] if index is not None]
            assert torch.bool not in kinds and torch.uint8 not in kinds, name
        return func(*args, **(kwargs or {}))


def check_gradient_and_reductions(loss, width):
    """Closed-form gradient, 'none' = 'sum' = 'mean' times divisor, weights of entries."""
    num_classes = loss.num_classes
    z, labels, weight = random_rows(1, 9, width, num_classes)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: seeded(loss, x, labels, weight, avg_factor=2.5), z)
    soft = torch.rand(9, num_classes, dtype=torch.float64) * torch.eye(num_classes + 1)[labels][
        :, :num_classes
    ].to(torch.float64)
    assert torch.autograd.gradcheck(lambda x: seeded(loss, x, soft, weight, avg_factor=2.5), z)
    none = seeded(loss, z, labels, weight, reduction_override='none')
    total = seeded(loss, z, labels, weight, reduction_override='sum')
    assert none.shape == (9, width)
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(seeded(loss, z, labels, weight), total / 9)
    for avg in (4, 2.5, torch.tensor(4.0), torch.tensor([3.0])):
        expected = total / float(avg)
        torch.testing.assert_close(seeded(loss, z, labels, weight, avg_factor=avg), expected)
    matrix = weight[:, None].expand(9, width)
    torch.testing.assert_close(seeded(loss, z, labels, matrix, avg_factor=4), total / 4)
    hard = torch.eye(num_classes + 1, dtype=torch.float64)[labels][:, :num_classes]
    torch.testing.assert_close(seeded(loss, z, hard, weight, avg_factor=4), total / 4)
    pair = (labels, torch.ones(9))
    torch.testing.assert_close(seeded(loss, z, pair, weight, avg_factor=4), total / 4)


def check_edges(loss, width):
    """Empty, all background, all foreground, huge logits, strange labels, half precision."""
    num_classes = loss.num_classes
    empty = torch.zeros(0, width, requires_grad=True)
    out = loss(empty, torch.zeros(0, dtype=torch.long), torch.zeros(0), avg_factor=0)
    out.backward()
    assert out.item() == 0 and empty.grad.shape == (0, width)
    for fill in (0, num_classes):
        for scale in (1.0, 1e4):
            z = (scale * torch.randn(6, width)).requires_grad_()
            out = loss(z, torch.full((6,), fill), avg_factor=0)
            out.backward()
            assert torch.isfinite(out) and torch.isfinite(z.grad).all()
            soft = torch.full((6, num_classes), 0.3)
            assert torch.isfinite(loss(z, soft, reduction_override='none')).all()
    z = torch.randn(6, width)
    assert loss(z, torch.zeros(6, dtype=torch.long), torch.zeros(6), avg_factor=1).item() == 0
    strange = torch.tensor([-1, num_classes + 4, num_classes, 100, -5, 99])
    background = torch.full((6,), num_classes)
    assert seeded(loss, z, strange) == seeded(loss, z, background)
    z = (5 * torch.randn(40, width)).to(torch.bfloat16)
    labels = torch.randint(0, num_classes + 1, (40,))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = seeded(loss, z, labels)
    assert out.dtype == torch.float32
    exact = seeded(loss, z.double(), labels)
    assert out.item() == pytest.approx(exact.item(), rel=1e-5)
    copy.deepcopy(loss)
    kept = [v for v in [*vars(loss).values(), *loss.buffers()] if isinstance(v, torch.Tensor)]
    assert not [v for v in kept if v.requires_grad]


def check_ignored_rows(loss, width):
    """Logits and labels of rows of weight 0 change nothing."""
    num_classes = loss.num_classes
    z, labels, weight = random_rows(2, 60, width, num_classes)
    other_z, other_labels = z.clone(), labels.clone()
    ignored = weight == 0
    assert ignored.any()
    other_z[ignored] = -7.0
    # A foreground row stays one and background stays background: random draws keep their places.
    other_labels[ignored & (labels < num_classes)] = num_classes - 1
    first, second = (
        seeded(loss, a, b, weight, avg_factor=1) for a, b in ((z, labels), (other_z, other_labels))
    )
    torch.testing.assert_close(first, second)


def check_no_sync(loss, width):
    """A training step and its backward never wait for the device."""
    z, labels, weight = random_rows(3, 20, width, loss.num_classes)
    z.requires_grad_()
    quality = torch.rand(20)
    with NoSync():
        loss(z, labels, weight, avg_factor=torch.tensor(3.0)).backward()
        loss(z, (labels, quality), weight).backward()
        loss(z, labels, reduction_override='none')


def check_checkpoint(kind, names, roi, **kwargs):
    """A loss filled from a checkpoint needs no statistics."""
    loss = build(kind, **kwargs)
    assert set(loss.state_dict()) == set(names)
    twin = MODELS.build(dict(type=f'mmdet_lt.{kind}', use_sigmoid=True, **kwargs))
    twin.load_state_dict(loss.state_dict())
    if roi:
        assert seeded(twin, LOGITS, LABELS) == seeded(loss, LOGITS, LABELS)
    assert seeded(twin, LOGITS[:, :3], LABELS) == seeded(loss, LOGITS[:, :3], LABELS)
