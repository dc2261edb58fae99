"""Logit adjustment against the paper, hand-worked values and its limits."""

import math

import pytest
import torch
from mmdet.models.losses import CrossEntropyLoss
from static_losses import (
    LABELS,
    LOGITS,
    build,
    check_checkpoint,
    check_extremes,
    check_forms,
    check_random_batches,
    given_counts,
    softmax_reference,
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.logit_adjusted_loss import logit_adjusted_loss, logit_offset

KIND = 'LogitAdjustedLoss'


def reference(counts, tau, num_columns):
    floored = [max(n, 1) for n in counts]
    shift = [tau * math.log(n / sum(floored)) for n in floored] + [0.0]
    factor = [1.0] * (len(counts) + 1)
    return lambda z, labels: softmax_reference(z, labels, lambda y: shift[:num_columns], factor)


def test_hand_worked_three_rows_of_four_columns():
    """All logits 0: classes take their prior, 0.6, 0.3, 0.1, background 1; then their squares."""
    labels = torch.tensor([0, 2, 3])
    rows = build(KIND, (6, 3, 1))(torch.zeros(3, 4), labels, reduction_override='none')
    expected = torch.tensor([math.log(2 / 0.6), math.log(2 / 0.1), math.log(2)])
    torch.testing.assert_close(rows, expected)
    rows = build(KIND, (6, 3, 1), tau=2.0)(torch.zeros(3, 4), labels, reduction_override='none')
    total = 0.36 + 0.09 + 0.01 + 1
    expected = torch.tensor([math.log(total / 0.36), math.log(total / 0.01), math.log(total)])
    torch.testing.assert_close(rows, expected)


@given_counts()
def test_follows_the_paper(counts, seed):
    tau = [0.25, 0.5, 1.0, 2.0][seed % 4]
    loss = build(KIND, counts, tau=tau, loss_weight=0.5)
    for num_columns in (len(counts), len(counts) + 1):
        check_random_batches(loss, reference(counts, tau, num_columns), num_columns, seed)


def test_limits_give_cross_entropy():
    plain = CrossEntropyLoss()
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 4
    expected = plain(z, labels, avg_factor=7)
    torch.testing.assert_close(build(KIND, tau=0.0)(z, labels, avg_factor=7), expected)
    # Equal classes, no column for background: one constant for all columns.
    got = build(KIND, (40, 40, 40))(z[:, :3], labels % 3)
    torch.testing.assert_close(got, plain(z[:, :3], labels % 3))


def test_tau_one_is_balanced_softmax_up_to_background():
    adjusted = build(KIND)
    balanced = build('BalancedSoftmaxLoss', background_ratio=1.0)
    z = LOGITS.clone()
    torch.testing.assert_close(adjusted(z, LABELS), balanced(z, LABELS), rtol=1e-6, atol=0)
    balanced = build('BalancedSoftmaxLoss')
    torch.testing.assert_close(
        adjusted(z[:, :3], LABELS), balanced(z[:, :3], LABELS), rtol=1e-6, atol=0
    )
    assert abs(adjusted(z, LABELS) - balanced(z, LABELS)) > 0.1


def test_counts_of_images_or_boxes():
    image = build(KIND, (100, 10, 10), (5, 4, 1), count='image')
    torch.testing.assert_close(image.offset.exp(), torch.tensor([0.5, 0.4, 0.1]))
    absent = build(KIND, (9, 0))
    torch.testing.assert_close(absent.offset.exp(), torch.tensor([0.9, 0.1]))


def test_the_pure_function_is_what_the_module_computes():
    offset = logit_offset(torch.tensor([1000.0, 100, 10], dtype=torch.float64), 0.5)
    rows = logit_adjusted_loss(LOGITS, LABELS, offset)
    got = build(KIND, tau=0.5)(LOGITS, LABELS, reduction_override='none')
    torch.testing.assert_close(got, rows, rtol=1e-6, atol=1e-6)


def test_forms_extremes_and_checkpoint():
    loss = build(KIND)
    for width in (3, 4):
        check_forms(loss, width)
        check_extremes(loss, width)
    check_checkpoint(loss, 4)
    torch.testing.assert_close(loss.get_activation(LOGITS), LOGITS.softmax(1)[:, :3])


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(tau=-0.5), 'tau'),
        (dict(tau=math.nan), 'tau'),
        (dict(tau=math.inf), 'tau'),
        (dict(count=None), 'count'),
    ],
)
def test_bad_arguments_name_their_key(kwargs, word):
    with pytest.raises(InputError, match=f'loss_cls.{word}'):
        build(KIND, **kwargs)
