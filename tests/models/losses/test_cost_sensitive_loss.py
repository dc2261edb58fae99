"""Cost-sensitive cross entropy against its formula, hand-worked values and its limits."""

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
    check_switch,
    given_counts,
    softmax_reference,
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.reweighting import weighted_softmax_loss

KIND = 'CostSensitiveLoss'


def test_hand_worked_three_rows_of_four_columns():
    """Counts 8, 4, 2: weights 1/4, 1/2, 1; with γ = 2 their squares."""
    loss = build(KIND, (8, 4, 2), gamma=2.0, background_weight=0.5)
    torch.testing.assert_close(loss.balance_weight, torch.tensor([1 / 16, 1 / 4, 1, 0.5]))
    rows = loss(torch.zeros(3, 4), torch.tensor([0, 2, 3]), reduction_override='none')
    torch.testing.assert_close(rows, torch.tensor([1 / 16, 1, 0.5]) * math.log(4))


def test_known_values():
    torch.testing.assert_close(build(KIND).balance_weight, torch.tensor([0.01, 0.1, 1, 1]))
    # Cross entropy of the rows 0, 1, 3 and 2, by hand from the softmax of the logits.
    ce = [
        math.log(sum(math.exp(v) for v in row)) - row[y]
        for row, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
    ]
    expected = (0.01 * ce[0] + 0.1 * ce[1] + ce[2] + ce[3]) / 4
    assert build(KIND)(LOGITS, LABELS).item() == pytest.approx(expected, rel=1e-6)


@given_counts()
def test_follows_the_formula(counts, seed):
    gamma = [0.0, 0.5, 1.0, 1.5][seed % 4]
    loss = build(KIND, counts, gamma=gamma, background_weight=0.2, loss_weight=1.5)
    floored = [max(n, 1) for n in counts]
    factor = [(min(floored) / n) ** gamma for n in floored] + [0.2]
    zeros = [0.0] * (len(counts) + 1)
    for num_columns in (len(counts), len(counts) + 1):
        check_random_batches(
            loss,
            lambda z, labels, k=num_columns: softmax_reference(
                z, labels, lambda y: zeros[:k], factor
            ),
            num_columns,
            seed,
        )


def test_limits_give_cross_entropy():
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels, weight = torch.arange(50) % 4, torch.rand(50)
    expected = CrossEntropyLoss()(z, labels, weight, avg_factor=7)
    for loss in (build(KIND, gamma=0.0), build(KIND, (40, 40, 40)), build(KIND, (0, 1, 0))):
        torch.testing.assert_close(loss(z, labels, weight, avg_factor=7), expected)
    weighted = CrossEntropyLoss(class_weight=[0.01, 0.1, 1.0, 0.3])
    got = build(KIND, background_weight=0.3)(z, labels, weight, avg_factor=7)
    torch.testing.assert_close(got, weighted(z, labels, weight, avg_factor=7))


def test_counts_of_images_or_boxes():
    image = build(KIND, (100, 10, 10), (8, 4, 2), count='image')
    torch.testing.assert_close(image.balance_weight, torch.tensor([0.25, 0.5, 1, 1]))
    torch.testing.assert_close(
        build(KIND, (100, 10, 0)).balance_weight, torch.tensor([0.01, 0.1, 1, 1])
    )


def test_the_pure_function_is_what_the_module_computes():
    loss = build(KIND)
    rows = weighted_softmax_loss(LOGITS, LABELS, loss.balance_weight)
    torch.testing.assert_close(loss(LOGITS, LABELS, reduction_override='none'), rows)


def test_forms_extremes_checkpoint_and_switch():
    loss = build(KIND, gamma=0.5)
    for width in (3, 4):
        check_forms(loss, width)
        check_extremes(loss, width)
    check_checkpoint(loss, 4)
    check_switch(loss, 4)


def test_a_background_weight_of_zero_silences_background():
    loss = build(KIND, background_weight=0)
    z = torch.randn(4, 4, requires_grad=True)
    loss(z, LABELS).backward()
    assert (z.grad[2] == 0).all() and (z.grad[[0, 1, 3]] != 0).all()


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(gamma=-1), 'gamma'),
        (dict(gamma=math.nan), 'gamma'),
        (dict(background_weight=-0.1), 'background_weight'),
        (dict(background_weight=math.inf), 'background_weight'),
        (dict(count='boxes'), 'count'),
    ],
)
def test_bad_arguments_name_their_key(kwargs, word):
    with pytest.raises(InputError, match=f'loss_cls.{word}'):
        build(KIND, **kwargs)
