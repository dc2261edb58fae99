"""Class-balanced focal loss against the paper, hand-worked values and its limits."""

import math

import pytest
import torch
from mmdet.models.losses import CrossEntropyLoss, FocalLoss
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
    sigmoid_reference,
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.class_balanced_focal_loss import class_balanced_focal_loss

KIND = 'ClassBalancedFocalLoss'
Z = LOGITS[:, :3]


def test_hand_worked_three_rows_of_three_columns():
    """All logits 0: every entry is (1/2)^γ log 2 times the weight of its row's label."""
    loss = build(KIND, (3, 2, 1), beta=0.5, gamma=2.0)
    entries = loss(torch.zeros(3, 3), torch.tensor([0, 2, 3]), reduction_override='none')
    row = torch.tensor([36 / 47, 63 / 47, 1]) * 0.25 * math.log(2)
    torch.testing.assert_close(entries, row[:, None].expand(3, 3))


def test_known_values():
    assert build(KIND, gamma=0.0, beta=0.0)(Z, LABELS).item() == pytest.approx(1.733766, abs=1e-6)


@given_counts()
def test_follows_the_paper(counts, seed):
    gamma = [0.0, 0.5, 1.0, 2.0][seed % 4]
    raw = [0.01 / (1 - 0.99 ** max(n, 1)) for n in counts]
    factor = [u * len(raw) / sum(raw) for u in raw] + [1.0]
    loss = build(KIND, counts, beta=0.99, gamma=gamma, loss_weight=1.5)
    check_random_batches(
        loss, lambda z, labels: sigmoid_reference(z, labels, factor, gamma), len(counts), seed
    )


def test_limits():
    labels, weight = torch.tensor([0, 1, 3, 2]), torch.rand(4)
    z = Z.float()
    # γ = 0 and equal weights: plain binary cross entropy.
    plain = CrossEntropyLoss(use_sigmoid=True)(z, labels, weight, avg_factor=3)
    for counts, beta in ((COUNTS, 0.0), ((40, 40, 40), 0.9999)):
        got = build(KIND, counts, beta=beta, gamma=0.0)(z, labels, weight, avg_factor=3)
        torch.testing.assert_close(got, plain)
    # α = 0.5 of the plain focal loss halves all entries.
    focal = FocalLoss(gamma=2.0, alpha=0.5)(z, labels, weight, avg_factor=3)
    got = build(KIND, beta=0.0, gamma=2.0)(z, labels, weight, avg_factor=3)
    torch.testing.assert_close(got, 2 * focal)


def test_the_weight_is_that_of_the_row_not_of_the_column():
    loss = build(KIND, beta=0.999, gamma=0.0)
    entries = loss(Z, LABELS, reduction_override='none')
    plain = build(KIND, beta=0.0, gamma=0.0)(Z, LABELS, reduction_override='none')
    row = torch.tensor([0.042160, 0.280000, 1.0, 2.677839], dtype=torch.float64)
    torch.testing.assert_close(entries / plain, row[:, None].expand(4, 3), rtol=1e-5, atol=1e-6)


def test_the_pure_function_is_what_the_module_computes():
    loss = build(KIND)
    total = class_balanced_focal_loss(Z, LABELS, loss.balance_weight, 0.5)
    torch.testing.assert_close(loss(Z, LABELS, reduction_override='sum'), total)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_forms_extremes_checkpoint_and_switch(gamma):
    loss = build(KIND, beta=0.999, gamma=gamma)
    check_forms(loss, 3)
    check_extremes(loss, 3)
    check_checkpoint(loss, 3, gamma=gamma)
    check_switch(loss, 3)


def test_scores_and_bias():
    loss = build(KIND, prior_prob=0.01)
    torch.testing.assert_close(loss.get_activation(Z), Z.sigmoid())
    assert loss.prior_bias() == pytest.approx(-4.59512, abs=1e-5)
    assert loss.get_cls_channels(3) == 3


@pytest.mark.parametrize('gamma', [-0.5, math.nan, math.inf])
def test_bad_arguments_name_their_key(gamma):
    with pytest.raises(InputError, match='loss_cls.gamma'):
        build(KIND, gamma=gamma)
