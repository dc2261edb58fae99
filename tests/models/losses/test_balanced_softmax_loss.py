"""Balanced Softmax against the paper, hand-worked values and its limits."""

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
from mmdet_lt.models.losses.balanced_softmax_loss import balanced_offset, balanced_softmax_loss

KIND = 'BalancedSoftmaxLoss'


def reference(counts, background, num_columns):
    shift = [math.log(max(n, 1)) for n in counts] + [background]
    factor = [1.0] * (len(counts) + 1)
    return lambda z, labels: softmax_reference(z, labels, lambda y: shift[:num_columns], factor)


def test_hand_worked_three_rows_of_four_columns():
    """All logits 0: the probabilities are the counts, 6 : 3 : 1 and background 1 or 20."""
    loss = build(KIND, (6, 3, 1))
    rows = loss(torch.zeros(3, 4), torch.tensor([0, 2, 3]), reduction_override='none')
    expected = torch.tensor([math.log(11 / 6), math.log(11), math.log(11)])
    torch.testing.assert_close(rows, expected)
    loss = build(KIND, (6, 3, 1), background_ratio=2.0)
    rows = loss(torch.zeros(3, 4), torch.tensor([0, 2, 3]), reduction_override='none')
    expected = torch.tensor([math.log(30 / 6), math.log(30), math.log(30 / 20)])
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize(('ratio', 'value'), [(None, 2.878048), (6.3313, 2.521104)])
def test_known_values(ratio, value):
    assert build(KIND, background_ratio=ratio)(LOGITS, LABELS).item() == pytest.approx(
        value, abs=1e-6
    )


@given_counts()
def test_follows_the_paper(counts, seed):
    loss = build(KIND, counts, loss_weight=1.5)
    check_random_batches(loss, reference(counts, 0.0, len(counts) + 1), len(counts) + 1, seed)
    background = math.log(2.5 * sum(max(n, 1) for n in counts))
    loss = build(KIND, counts, background_ratio=2.5)
    check_random_batches(
        loss, reference(counts, background, len(counts) + 1), loss.num_classes + 1, seed
    )
    check_random_batches(loss, reference(counts, background, len(counts)), len(counts), seed)


def test_equal_counts_give_cross_entropy():
    plain = CrossEntropyLoss()
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 4
    weight = torch.rand(50)
    expected = plain(z, labels, weight, avg_factor=7)
    # Background as frequent as each class: one constant for all columns.
    for counts, ratio in (((40, 40, 40), 1 / 3), ((1, 1, 1), None), ((0, 0, 0), None)):
        got = build(KIND, counts, background_ratio=ratio)(z, labels, weight, avg_factor=7)
        torch.testing.assert_close(got, expected)
    # Without a column for background any equal counts do.
    z, labels = z[:, :3], labels % 3
    got = build(KIND, (40, 40, 40))(z, labels, weight, avg_factor=7)
    torch.testing.assert_close(got, plain(z, labels, weight, avg_factor=7))


def test_a_column_without_background_ignores_background_rows():
    loss = build(KIND)
    rows = loss(LOGITS[:, :3], LABELS, reduction_override='none')
    assert rows[2] == 0 and (rows[[0, 1, 3]] > 0).all()


def test_counts_of_images_or_boxes():
    instance = build(KIND, (100, 10, 10), (5, 5, 1))
    image = build(KIND, (100, 10, 10), (5, 5, 1), count='image')
    torch.testing.assert_close(instance.offset.exp(), torch.tensor([100.0, 10, 10, 1]))
    torch.testing.assert_close(image.offset.exp(), torch.tensor([5.0, 5, 1, 1]))


def test_the_pure_function_is_what_the_module_computes():
    offset = balanced_offset(torch.tensor([1000.0, 100, 10], dtype=torch.float64), 6.3313)
    rows = balanced_softmax_loss(LOGITS, LABELS, offset)
    got = build(KIND, background_ratio=6.3313)(LOGITS, LABELS, reduction_override='none')
    torch.testing.assert_close(got, rows, rtol=1e-6, atol=1e-6)


def test_forms_extremes_and_checkpoint():
    for kwargs in ({}, dict(background_ratio=6.3313)):
        loss = build(KIND, **kwargs)
        for width in (3, 4):
            check_forms(loss, width)
        check_extremes(loss, 4)
        check_checkpoint(loss, 4)


def test_scores_are_those_of_the_logits_alone():
    loss = build(KIND)
    torch.testing.assert_close(loss.get_activation(LOGITS), LOGITS.softmax(1)[:, :3])
    assert loss.get_cls_channels(3) == 4
    torch.testing.assert_close(loss.get_activation(LOGITS), LOGITS.softmax(1))


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(background_ratio=0), 'background_ratio'),
        (dict(background_ratio=-1.0), 'background_ratio'),
        (dict(background_ratio=math.inf), 'background_ratio'),
        (dict(background_ratio=math.nan), 'background_ratio'),
        (dict(count='boxes'), 'count'),
        (dict(use_sigmoid=True), 'use_sigmoid=False'),
        (dict(prior_prob=0.01), 'prior_prob'),
    ],
)
def test_bad_arguments_name_their_key(kwargs, word):
    with pytest.raises(InputError, match=word):
        build(KIND, **kwargs)
