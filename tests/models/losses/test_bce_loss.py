"""BCELoss: the plain baseline against torch, hand values and the contract."""

import math

import pytest
import torch
import torch.nn.functional as F
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
    slow_loss,
)

from mmdet_lt import InputError
from mmdet_lt.models.losses.bce_loss import bce_loss


def test_hand_values():
    assert build('BCELoss')(LOGITS[:, :3], LABELS).item() == pytest.approx(1.733766, abs=1e-6)
    # With a fourth class in place of background.
    assert bce_loss(LOGITS, LABELS).item() / 4 == pytest.approx(2.202590, abs=1e-6)
    # All scores one half: log 2 for each of the 12 entries.
    assert build('BCELoss')(torch.zeros(4, 3), LABELS).item() == pytest.approx(3 * math.log(2))


@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 300), num_classes=st.integers(1, 30), seed=st.integers(0, 99))
def test_is_the_mean_of_torchs_cross_entropy(rows, num_classes, seed):
    z, labels, weight = random_rows(seed, rows, num_classes, num_classes)
    target = torch.eye(num_classes + 1, dtype=torch.float64)[labels][:, :num_classes]
    loss = build('BCELoss', counts=(5,) * num_classes, loss_weight=1.5)
    expected = F.binary_cross_entropy_with_logits(z, target, weight[:, None], reduction='sum')
    torch.testing.assert_close(loss(z, labels, weight, avg_factor=7), 1.5 * expected / 7)


def test_is_the_slow_sum():
    z, labels, weight = random_rows(0, 30, 4, 4)
    loss = build('BCELoss', counts=(5, 4, 3, 2))
    expected = slow_loss(z, labels, lambda i, j, t: 1.0, weight)
    assert loss(z, labels, weight, avg_factor=1).item() == pytest.approx(expected, rel=1e-12)


def test_class_weight_scales_positive_entries():
    loss = build('BCELoss', class_weight=[2.0, 3.0, 4.0])
    expected = slow_loss(LOGITS[:, :3], LABELS, lambda i, j, t: (2.0, 3.0, 4.0)[j] if t else 1.0)
    assert loss(LOGITS[:, :3], LABELS, avg_factor=1).item() == pytest.approx(expected)


def test_contract():
    loss = build('BCELoss')
    check_gradient_and_reductions(loss, 3)
    check_edges(loss, 3)
    check_ignored_rows(loss, 3)
    check_no_sync(loss, 3)
    check_checkpoint('BCELoss', (), roi=False, num_classes=3)


def test_scores_width_and_prior():
    loss = build('BCELoss', roi=True)
    assert loss.get_cls_channels(3) == 3
    scores = loss.get_activation(LOGITS[:, :3])
    torch.testing.assert_close(scores[:, :3], LOGITS[:, :3].sigmoid())
    assert (scores[:, 3] == 0).all()
    assert loss.prior_bias() == pytest.approx(-6.90675, abs=1e-5)
    assert build('BCELoss', prior_prob=None).prior_bias() is None


def test_bad_arguments():
    with pytest.raises(InputError, match='use_sigmoid'):
        from mmdet.registry import MODELS

        MODELS.build(dict(type='mmdet_lt.BCELoss', use_sigmoid=False))
    with pytest.raises(TypeError, match='ignore_index'):
        build('BCELoss', ignore_index=255)
