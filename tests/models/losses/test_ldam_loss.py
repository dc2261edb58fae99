"""LDAM against the paper, hand-worked values, its limits and deferred weights."""

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
from mmdet_lt.models.losses.ldam_loss import ldam_loss

KIND = 'LDAMLoss'
COSINES = LOGITS / 2


def test_hand_worked_three_rows_of_four_columns():
    """Counts 256, 16, 1: margins 1/8, 1/4, 1/2; with scale log 16 they divide by √2, 2, 4."""
    loss = build(KIND, (256, 16, 1), scale=math.log(16))
    torch.testing.assert_close(loss.margin, torch.tensor([0.125, 0.25, 0.5, 0]))
    rows = loss(torch.zeros(3, 4), torch.tensor([0, 2, 3]), reduction_override='none')
    odds = [3 * math.sqrt(2), 3 * 4, 3]  # of the other columns to the label's
    torch.testing.assert_close(rows, torch.tensor([math.log(1 + o) for o in odds]))


def test_known_values():
    loss = build(KIND)
    expected = torch.tensor([0.158114, 0.281171, 0.5, 0])
    torch.testing.assert_close(loss.margin, expected, rtol=0, atol=1e-6)
    foreground = [0, 1, 3]
    z, labels = COSINES[foreground][:, :3], LABELS[foreground]
    assert loss(z, labels).item() == pytest.approx(3.422491, abs=1e-5)
    total = loss(z, labels, reduction_override='sum')
    assert total.item() == pytest.approx(10.267474, abs=1e-5)


@given_counts()
def test_follows_the_paper(counts, seed):
    scale = [1.0, 10.0, 30.0][seed % 3]
    beta = [None, 0.99][seed % 2]
    loss = build(KIND, counts, max_margin=0.4, scale=scale, beta=beta, loss_weight=0.5)
    floored = [max(n, 1) for n in counts]
    delta = [n**-0.25 for n in floored]
    delta = [0.4 * d / max(delta) for d in delta] + [0.0]
    raw = [0.01 / (1 - 0.99**n) for n in floored]
    factor = [1.0 if beta is None else u * len(raw) / sum(raw) for u in raw] + [1.0]
    for num_columns in (len(counts), len(counts) + 1):

        def shift(y, k=num_columns):
            return [-scale * delta[y] if column == y else 0.0 for column in range(k)]

        check_random_batches(
            loss,
            lambda z, labels, shift=shift: softmax_reference(z, labels, shift, factor, scale),
            num_columns,
            seed,
        )


def test_limits_give_cross_entropy():
    plain = CrossEntropyLoss()
    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels, weight = torch.arange(50) % 4, torch.rand(50)
    got = build(KIND, max_margin=0.0)(z, labels, weight, avg_factor=7)
    torch.testing.assert_close(got, plain(30 * z, labels, weight, avg_factor=7))
    # Equal counts: the same margin for every class, none for background.
    got = build(KIND, (40, 40, 40), scale=1.0)(z, labels, weight, avg_factor=7)
    moved = z - 0.5 * torch.eye(4)[labels] * (labels < 3)[:, None]
    torch.testing.assert_close(got, plain(moved, labels, weight, avg_factor=7))


def test_background_rows_have_no_margin():
    background = torch.full((4,), 3)
    got = build(KIND, scale=1.0)(LOGITS, background)
    plain = build(KIND, scale=1.0, max_margin=0.0)
    torch.testing.assert_close(got, plain(LOGITS, background))
    assert build(KIND, scale=1.0)(LOGITS, LABELS) > plain(LOGITS, LABELS)


def test_the_scale_is_applied_at_test_and_the_margin_is_not():
    loss = build(KIND, scale=4.0)
    torch.testing.assert_close(loss.get_activation(COSINES), (4 * COSINES).softmax(1)[:, :3])
    assert loss.get_accuracy(COSINES, COSINES.argmax(1))['acc'] == 100


def test_counts_of_images_or_boxes():
    image = build(KIND, (9, 9, 9), (8, 8, 8), count='image').margin
    torch.testing.assert_close(image, torch.tensor([0.5, 0.5, 0.5, 0]))
    absent = build(KIND, (256, 0)).margin
    torch.testing.assert_close(absent, torch.tensor([0.125, 0.5, 0]))


def test_the_pure_function_is_what_the_module_computes():
    loss = build(KIND)
    rows = ldam_loss(COSINES, LABELS, loss.margin)
    torch.testing.assert_close(loss(COSINES, LABELS, reduction_override='none'), rows)


@pytest.mark.parametrize('kwargs', [dict(), dict(beta=0.999), dict(scale=2.0)])
def test_forms_extremes_and_checkpoint(kwargs):
    loss = build(KIND, **kwargs)
    for width in (3, 4):
        check_forms(loss, width)
        check_extremes(loss, width)
    check_checkpoint(loss, 4, **kwargs)


def test_deferred_weights_exist_only_with_beta():
    """The hook looks for `set_rebalancing`; without weights there is nothing to switch."""
    assert not hasattr(build(KIND), 'set_rebalancing')
    loss = build(KIND, beta=0.999, scale=2.0)
    check_switch(loss, 4)
    loss.set_rebalancing(False)
    torch.testing.assert_close(loss(LOGITS, LABELS), build(KIND, scale=2.0)(LOGITS, LABELS))


@pytest.mark.parametrize(
    ('kwargs', 'word'),
    [
        (dict(max_margin=-0.1), 'max_margin'),
        (dict(max_margin=math.nan), 'max_margin'),
        (dict(scale=0), 'scale'),
        (dict(scale=math.inf), 'scale'),
        (dict(beta=1.0), 'beta'),
        (dict(count='boxes'), 'count'),
    ],
)
def test_bad_arguments_name_their_key(kwargs, word):
    with pytest.raises(InputError, match=f'loss_cls.{word}'):
        build(KIND, **kwargs)
