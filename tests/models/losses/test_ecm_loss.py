"""ECM: vectors, the paper's margins with exponentials, scores, counts, the contract."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sigmoid_toys import (
    LABELS,
    LOGITS,
    build,
    check_checkpoint,
    check_edges,
    check_gradient_and_reductions,
    check_ignored_rows,
    check_no_sync,
    random_rows,
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.ecm_loss import ecm_loss, ecm_margins

RATIO = 6.3313


def slow_ecm(z, labels, counts, weight=None, ratio=RATIO):
    """The paper's form: two margins, two exponentials, a weight for each column."""
    n = [max(value, 1) for value in counts]
    n.append(ratio * sum(n))
    total, sum_of_all = 0.0, sum(n)
    for i, row in enumerate(z.tolist()):
        for j, value in enumerate(row):
            plus, minus = n[j] ** 0.25, (sum_of_all - n[j]) ** 0.25
            m_plus, m_minus = math.log((plus + minus) / minus), math.log((plus + minus) / plus)
            up, down = math.exp(value + m_plus), math.exp(-value + m_minus)
            p = up / (up + down) if int(labels[i]) == j else down / (up + down)
            a = (sum_of_all - n[j]) / n[j]
            w = a * math.log((1 + a) / a) * (1.0 if weight is None else float(weight[i]))
            total -= w * math.log(p)
    return total


def test_hand_values():
    count = torch.tensor([1000.0, 100.0, 10.0], dtype=torch.float64)
    margin, weight = ecm_margins(count)
    expected = [-0.491349, -1.096683, -1.675113, 0.461376]
    torch.testing.assert_close(margin, torch.tensor(expected).double(), atol=1e-6, rtol=0)
    expected = [0.935874, 0.993830, 0.999385, 0.314651]
    torch.testing.assert_close(weight, torch.tensor(expected).double(), atol=1e-6, rtol=0)
    loss = ecm_loss(LOGITS, LABELS, margin, weight) / 4
    assert loss.item() == pytest.approx(1.218242, abs=1e-6)
    assert build('ECMLoss', roi=True)(LOGITS, LABELS).item() == pytest.approx(1.218242, abs=1e-6)


@given(
    st.lists(st.integers(0, 50_000), min_size=1, max_size=8),
    st.integers(0, 2**31 - 1),
    st.sampled_from([0.5, 1.0, RATIO]),
)
@settings(max_examples=25, deadline=None, database=None)
def test_follows_the_paper(counts, seed, ratio):
    loss = build('ECMLoss', tuple(counts), roi=True, fg_bg_ratio=ratio)
    z, labels, weight = random_rows(seed, 9, len(counts) + 1, len(counts))
    out = loss(z, labels, weight, avg_factor=2.5)
    wanted = slow_ecm(z, labels, counts, weight, ratio) / 2.5
    assert out.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_dense_heads_have_the_columns_of_the_classes_only():
    loss = build('ECMLoss')
    none = build('ECMLoss', roi=True)(LOGITS, LABELS, reduction_override='none')
    dense = loss(LOGITS[:, :3], LABELS, reduction_override='none')
    torch.testing.assert_close(dense, none[:, :3])
    torch.testing.assert_close(loss.get_activation(LOGITS[:, :3]), LOGITS[:, :3].sigmoid())


def test_scores_know_neither_margin_nor_factor():
    scores = build('ECMLoss', roi=True).get_activation(LOGITS)
    expected = [0.534447, 0.276004, 0.401961, 0.268941]
    torch.testing.assert_close(scores[0], torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_rare_classes_need_a_higher_logit():
    """At the margin's logit, -δ/2, a column is undecided; it rises as the class gets rarer."""
    loss = build('ECMLoss', roi=True)
    undecided = -loss.margin / 2
    assert (undecided.diff()[:2] > 0).all() and undecided[3] < 0
    z = undecided.repeat(1, 1)
    z.requires_grad_()
    loss(z, torch.tensor([0]), reduction_override='sum').backward()
    expected = loss.column_weight * torch.tensor([-1.0, 1.0, 1.0, 1.0])  # 2 * (1/2) * w
    torch.testing.assert_close(z.grad[0], expected)


def test_counts():
    """Boxes instead of images on request; a class never seen counts as seen once."""
    loss = build('ECMLoss', (10, 5, 0), instances=(30, 60, 0), count='instance')
    margin, weight = ecm_margins(torch.tensor([30.0, 60.0, 1.0]).double())
    torch.testing.assert_close(loss.margin, margin.float())
    torch.testing.assert_close(loss.column_weight, weight.float())
    images = build('ECMLoss', (10, 5, 0), instances=(30, 60, 0))
    torch.testing.assert_close(
        images.margin, ecm_margins(torch.tensor([10.0, 5.0, 1.0]).double())[0].float()
    )


@pytest.mark.parametrize('roi', [True, False])
def test_contract(roi):
    loss, width = build('ECMLoss', roi=roi), 3 + roi
    check_gradient_and_reductions(loss, width)
    check_ignored_rows(loss, width)
    check_edges(loss, width)
    check_no_sync(loss, width)


def test_checkpoint():
    check_checkpoint('ECMLoss', ('margin', 'column_weight'), roi=True)


@pytest.mark.parametrize(
    ('kwargs', 'key'), [(dict(fg_bg_ratio=0), 'fg_bg_ratio'), (dict(count='boxes'), 'count')]
)
def test_bad_arguments(kwargs, key):
    with pytest.raises(InputError, match=f'loss_cls.{key}'):
        build('ECMLoss', **kwargs)
