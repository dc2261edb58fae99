"""Group softmax loss (BAGS) against the paper, hand-worked values and its limits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from static_losses import build, check_checkpoint, check_extremes, check_forms

from mmdet_lt import InputError
from mmdet_lt.models.losses.group_softmax_loss import draw_rows, group_layout

KIND = 'GroupSoftmaxLoss'
#: Six classes in three of four groups: <10: 1 and 5; 10-99: none; 100-999: 0, 2; >=1000: 3, 4.
COUNTS = (100, 9, 999, 1000, 5000, 0)
#: [others 1 5][others][others 0 2][others 3 4][foreground background]
COLUMNS = [5, 1, 6, 8, 9, 2]


def cross_entropy(values, label):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values)) - values[label]


def reference(z, labels, groups, weight):
    """The paper's value where all rows of others are taken, in plain float64.

    ``groups`` are lists of classes; rows of weight 0 do not exist.
    """
    rows = [i for i in range(len(z)) if weight[i]]
    total, start = 0.0, 0
    for members in groups:
        part = [list(row[start : start + 1 + len(members)]) for row in z]
        start += 1 + len(members)
        local = [members.index(y) + 1 if y in members else 0 for y in labels]
        if any(local[i] for i in rows):
            ce = [weight[i] * cross_entropy(part[i], local[i]) for i in rows]
            total += sum(ce) / len(rows)
    num_classes = sum(map(len, groups))
    ce = [weight[i] * cross_entropy(list(z[i][start:]), labels[i] == num_classes) for i in rows]
    return total + sum(ce) / max(len(rows), 1)


def test_layout():
    loss = build(KIND, COUNTS)
    assert loss.get_cls_channels(6) == 12
    assert loss.class_group.tolist() == [2, 0, 2, 3, 3, 0]
    assert loss.class_column.tolist() == COLUMNS
    assert loss.group_sizes == [3, 1, 3, 3, 2]
    sizes, column, local = group_layout(np.array([1, 0, 1]), 2)
    assert sizes == [2, 3, 2] and column.tolist() == [3, 1, 4]
    assert local.tolist() == [[0, 1, 0], [1, 0, 0], [0, 2, 0], [0, 0, 1]]


def test_groups_by_boxes_or_images():
    boxes = build(KIND, (1000, 100), (90, 5))
    images = build(KIND, (1000, 100), (90, 5), count='image')
    assert boxes.class_group.tolist() == [3, 2]
    assert images.class_group.tolist() == [1, 0]


def test_hand_worked():
    """Logits 0, two rows of class 1, one of background: nothing depends on chance (β = 8)."""
    loss = build(KIND, COUNTS)
    z, label = torch.zeros(3, 12), torch.tensor([1, 1, 6])
    rows = loss(z, label, reduction_override='none')
    # First group: three columns, all rows. No other group has a member; the last takes all rows.
    torch.testing.assert_close(rows, torch.full((3,), math.log(3) + math.log(2)))
    # Without others the first group has two rows, so each weighs 3 / 2.
    rows = build(KIND, COUNTS, beta=0.0)(z, label, reduction_override='none')
    expected = [1.5 * math.log(3) + math.log(2)] * 2 + [math.log(2)]
    torch.testing.assert_close(rows, torch.tensor(expected))


@pytest.mark.parametrize('seed', range(12))
def test_follows_the_paper_where_all_rows_are_taken(seed):
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 9, 10, 99, 100, 999, 1000, 20_000], int(rng.integers(1, 9)))
    bounds = (10, 100, 1000)
    groups = [[] for _ in range(4)]
    for c, count in enumerate(counts):
        groups[sum(count >= bound for bound in bounds)].append(c)
    loss = build(KIND, counts.tolist(), beta=1e6, loss_weight=1.5)
    number = int(rng.integers(1, 30))
    z = rng.normal(0, 2, (number, len(counts) + 6))
    labels = rng.integers(0, len(counts) + 1, number)
    weight = rng.choice([0.0, 1.0, 0.5], number)
    positive = max(int((weight > 0).sum()), 1)
    arguments = torch.from_numpy(labels), torch.from_numpy(weight)
    out = loss(torch.from_numpy(z), *arguments, avg_factor=positive)
    expected = reference(z.tolist(), labels.tolist(), groups, weight.tolist())
    assert out.item() == pytest.approx(1.5 * expected, rel=1e-6, abs=1e-9)


def test_drawn_rows():
    """All members, β times as many others, each other equally often, never a row of weight 0."""
    local = torch.zeros(100, 3, dtype=torch.long)
    local[:4, 0] = torch.tensor([1, 2, 1, 1])
    local[50:, 2] = 1
    counted = torch.ones(100, dtype=torch.bool)
    counted[[3, 98]] = False
    torch.manual_seed(0)
    times = torch.zeros(100)
    for _ in range(400):
        drawn = draw_rows(local, 8.5, counted)
        assert drawn.sum(0).tolist() == [3 + 25, 0, 98]
        assert drawn[:3, 0].all() and not drawn[~counted].any()
        times += drawn[:, 0]
    others = times[counted][3:]
    # Binomial, 400 draws of probability 25 / 95: five standard deviations are 44.
    assert len(others) == 95 and (others - 400 * 25 / 95).abs().max() < 44
    few = draw_rows(local[:6], 8.5, counted[:6])
    assert few[:, 0].tolist() == [True, True, True, False, True, True]


def test_value_of_a_draw_is_normalised_by_its_rows():
    """Equal rows have equal losses, so any draw of them has the same mean."""
    loss = build(KIND, COUNTS)
    z = torch.randn(12, generator=torch.Generator().manual_seed(0)).repeat(90, 1)
    label = torch.full((90,), 6)
    label[:5] = 4
    value = loss(z, label, avg_factor=90)
    row = z[0].double().tolist()
    others, own = cross_entropy(row[7:10], 0), cross_entropy(row[7:10], 2)
    last = (5 * cross_entropy(row[10:], 0) + 85 * cross_entropy(row[10:], 1)) / 90
    assert value.item() == pytest.approx((5 * own + 40 * others) / 45 + last, rel=1e-5)
    torch.testing.assert_close(loss(z, label, avg_factor=45), 2 * value)


def test_one_group_of_all_classes():
    """One bound above all counts: softmax with others, and one of foreground and background."""
    loss = build(KIND, COUNTS, bin_split=(10_000,), beta=1e6)
    z = torch.randn(40, 10, generator=torch.Generator().manual_seed(1))
    label = torch.arange(40) % 7
    rows = loss(z, label, reduction_override='none')
    member = F.cross_entropy(z[:, :7], (label + 1) % 7, reduction='none')
    last = F.cross_entropy(z[:, 8:], (label == 6).long(), reduction='none')
    torch.testing.assert_close(rows, member + last)


def test_scores():
    loss = build(KIND, COUNTS)
    z = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    scores = loss.get_activation(z)
    for c, column in enumerate(COLUMNS):
        start, end = {1: (0, 3), 2: (0, 3), 5: (4, 7), 6: (4, 7), 8: (7, 10), 9: (7, 10)}[column]
        expected = z[:, start:end].softmax(1)[:, column - start] * z[:, 10:].softmax(1)[:, 0]
        torch.testing.assert_close(scores[:, c], expected)
    torch.testing.assert_close(scores[:, 6], z[:, 10:].softmax(1)[:, 1])
    assert torch.equal(loss.predict(z), scores.argmax(1))


def test_weights_of_classes_reach_their_columns():
    """A weight (N, C) is in the order of classes, one (N, K) in that of columns."""
    loss = build(KIND, COUNTS, beta=1e6)
    z = torch.randn(14, 12, generator=torch.Generator().manual_seed(3))
    label = torch.arange(14) % 7
    weight = 0.5 + torch.rand(14, 6, generator=torch.Generator().manual_seed(4))
    columns = weight.max(1, keepdim=True).values.repeat(1, 12)
    columns[:, COLUMNS] = weight
    torch.testing.assert_close(loss(z, label, weight), loss(z, label, columns))
    other = build(KIND, COUNTS, beta=1e6)(z, label, weight.flip(1))
    assert other != loss(z, label, weight)


def test_forms_extremes_and_checkpoint():
    loss = build(KIND, (1000, 100, 10), beta=1e6)
    check_forms(loss, 9)
    check_extremes(loss, 9)
    check_checkpoint(loss, 9, beta=1e6)


def test_scores_without_annotations():
    """What tools/test.py does: a head, then a checkpoint."""
    trained, bare = build(KIND, COUNTS), MODELS.build(dict(type=f'mmdet_lt.{KIND}'))
    assert bare.get_cls_channels(6) == 12
    z = torch.randn(5, 12)
    with pytest.raises(InputError, match='no class statistics'):
        bare.get_activation(z)
    bare.load_state_dict(trained.state_dict())
    assert torch.equal(bare.get_activation(z), trained.get_activation(z))
    with pytest.raises(InputError, match='bin_split'):
        MODELS.build(dict(type=f'mmdet_lt.{KIND}', bin_split=(10,))).load_state_dict(
            trained.state_dict()
        )


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(bin_split=()), 'bin_split'),
        (dict(bin_split=(10, 10)), 'bin_split'),
        (dict(bin_split=(0, 10)), 'bin_split'),
        (dict(beta=-1), 'beta'),
        (dict(beta=math.nan), 'beta'),
        (dict(count='boxes'), 'count'),
        (dict(use_sigmoid=True), 'use_sigmoid=False'),
    ],
)
def test_bad_arguments_name_their_key(kwargs, word):
    with pytest.raises(InputError, match=word):
        build(KIND, **kwargs)
