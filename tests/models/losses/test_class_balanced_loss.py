"""Class-balanced cross entropy against the paper, hand-worked values and its limits."""

import math
from fractions import Fraction

import pytest
import torch
from mmdet.models.losses import CrossEntropyLoss
from static_losses import (
    COUNTS,
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
from mmdet_lt.models.losses.class_balanced_loss import (
    effective_number_weight,
)
from mmdet_lt.models.losses.reweighting import weighted_softmax_loss

KIND = 'ClassBalancedLoss'


def exact_weights(counts, beta):
    """The formula as the paper writes it, in rational numbers; beta as a decimal string."""
    beta = Fraction(beta)
    raw = [(1 - beta) / (1 - beta ** max(n, 1)) for n in counts]
    return [float(len(raw) * u / sum(raw)) for u in raw]


def test_hand_worked_three_rows_of_four_columns():
    """β = 0.5 and counts 3, 2, 1: effective numbers 7/4, 3/2, 1, weights 36, 42, 63 of 47ths."""
    loss = build(KIND, (3, 2, 1), beta=0.5)
    expected = torch.tensor([36 / 47, 42 / 47, 63 / 47, 1])
    torch.testing.assert_close(loss.balance_weight, expected)
    rows = loss(torch.zeros(3, 4), torch.tensor([0, 2, 3]), reduction_override='none')
    torch.testing.assert_close(rows, expected[[0, 2, 3]] * math.log(4))


def test_known_values():
    loss = build(KIND, beta=0.999)
    expected = torch.tensor([0.042160, 0.280000, 2.677839, 1])
    torch.testing.assert_close(loss.balance_weight, expected, rtol=0, atol=1e-6)
    assert loss(LOGITS, LABELS).item() == pytest.approx(0.714588, abs=1e-6)


@pytest.mark.parametrize('beta', ['0', '0.9', '0.9999', '0.99999999'])
def test_weights_keep_their_digits(beta):
    counts = (1, 2, 7, 130, 2_000, 0)
    got = effective_number_weight(
        torch.tensor(counts, dtype=torch.float64).clamp_min(1), float(beta)
    )
    torch.testing.assert_close(got.tolist(), exact_weights(counts, beta), rtol=1e-7, atol=0)
    assert got.sum().item() == pytest.approx(len(counts), rel=1e-12)


@given_counts()
def test_follows_the_paper(counts, seed):
    loss = build(KIND, counts, beta=0.99, loss_weight=1.5)
    raw = [0.01 / (1 - 0.99 ** max(n, 1)) for n in counts]
    factor = [u * len(raw) / sum(raw) for u in raw] + [1.0]
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


def test_limits():
    plain = CrossEntropyLoss()
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels, weight = torch.arange(50) % 4, torch.rand(50)
    expected = plain(z, labels, weight, avg_factor=7)
    for counts, beta in (((40, 40, 40), 0.9999), (COUNTS, 0.0), ((0, 1, 1), 0.9)):
        loss = build(KIND, counts, beta=beta)
        torch.testing.assert_close(loss(z, labels, weight, avg_factor=7), expected)
    # β close to 1: inverse counts.
    inverse = torch.tensor([1 / n for n in COUNTS])
    weights = build(KIND, beta=1 - 1e-9).balance_weight[:3]
    torch.testing.assert_close(weights, 3 * inverse / inverse.sum(), rtol=1e-5, atol=0)


def test_the_cut_leaves_lower_weights_and_background_alone():
    free, cut = build(KIND, beta=0.999), build(KIND, beta=0.999, max_weight=2.0)
    assert cut.balance_weight[2] == 2 and free.balance_weight[2] > 2
    assert torch.equal(free.balance_weight[[0, 1, 3]], cut.balance_weight[[0, 1, 3]])
    low = build(KIND, beta=0.999, max_weight=0.1).balance_weight
    torch.testing.assert_close(low, torch.tensor([0.042160, 0.1, 0.1, 1]), rtol=0, atol=1e-6)


def test_counts_of_images_or_boxes():
    image = build(KIND, (100, 10, 10), (5, 5, 5), count='image')
    torch.testing.assert_close(image.balance_weight, torch.ones(4))
    assert build(KIND, (100, 10, 10), (5, 5, 5)).balance_weight[0] < 0.5


def test_a_fixed_class_weight_multiplies():
    loss = build(KIND, class_weight=[2.0, 1.0, 1.0, 0.5])
    rows = loss(LOGITS, LABELS, reduction_override='none')
    plain = build(KIND)(LOGITS, LABELS, reduction_override='none')
    factor = torch.tensor([2, 1, 0.5, 1], dtype=torch.float64)
    torch.testing.assert_close(rows, plain * factor)


def test_the_pure_function_is_what_the_module_computes():
    loss = build(KIND)
    rows = weighted_softmax_loss(LOGITS, LABELS, loss.balance_weight)
    torch.testing.assert_close(loss(LOGITS, LABELS, reduction_override='none'), rows)


def test_forms_extremes_checkpoint_and_switch():
    loss = build(KIND, beta=0.999)
    for width in (3, 4):
        check_forms(loss, width)
        check_extremes(loss, width)
    check_checkpoint(loss, 4)
    check_switch(loss, 4)


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(beta=1.0), 'beta'),
        (dict(beta=-0.1), 'beta'),
        (dict(beta=math.nan), 'beta'),
        (dict(max_weight=0), 'max_weight'),
        (dict(max_weight=-1), 'max_weight'),
        (dict(count='box'), 'count'),
    ],
)
@pytest.mark.parametrize('kind', [KIND, 'ClassBalancedFocalLoss'])
def test_bad_arguments_name_their_key(kind, kwargs, word):
    with pytest.raises(InputError, match=f'loss_cls.{word}` of {kind}'):
        build(kind, **kwargs)
