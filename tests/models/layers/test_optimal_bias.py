"""Arithmetic of the optimal prior and bias: known numbers, and that they are minima."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmdet_lt import InputError
from mmdet_lt.models.layers.optimal_bias import optimal_prior, sigmoid_bias, softmax_biases


@pytest.mark.parametrize(
    ('prior', 'bias'),
    [(0.01, -4.59512), (0.001, -6.90675), (1e-4, -9.21024), (1e-5, -11.51292), (0.5, 0.0)],
)
def test_sigmoid_bias_of_known_priors(prior, bias):
    assert sigmoid_bias(prior) == pytest.approx(bias, abs=5e-6)


def test_the_papers_form_of_the_bias():
    """``b = -log(N C / N_f - 1)``."""
    prior = optimal_prior(60, 120_000, 80)
    assert prior == pytest.approx(60 / 9_600_000)
    assert sigmoid_bias(prior) == pytest.approx(-math.log(120_000 * 80 / 60 - 1), abs=1e-9)


def test_sigmoid_bias_minimises_binary_cross_entropy():
    num_fg, num_rows, num_classes = 3, 40, 5
    labels = torch.full((num_rows,), num_classes)
    labels[:num_fg] = torch.tensor([0, 4, 2])
    target = F.one_hot(labels, num_classes + 1)[:, :-1].double()
    bias = torch.tensor(sigmoid_bias(optimal_prior(num_fg, num_rows, num_classes))).double()
    bias.requires_grad_()
    F.binary_cross_entropy_with_logits(bias.expand_as(target), target).backward()
    assert abs(bias.grad) < 1e-8


def test_softmax_biases_minimise_cross_entropy_under_equal_classes():
    num_fg, num_rows, num_classes = 10, 200, 5
    b_fg, b_bg = softmax_biases(optimal_prior(num_fg, num_rows, num_classes), num_classes)
    assert b_bg - b_fg == pytest.approx(math.log((num_rows / num_fg - 1) * num_classes))
    labels = torch.full((num_rows,), num_classes)
    labels[:num_fg] = torch.arange(num_fg) % num_classes
    bias = torch.tensor([b_fg] * num_classes + [b_bg], dtype=torch.float64, requires_grad=True)
    F.cross_entropy(bias.expand(num_rows, -1), labels).backward()
    assert bias.grad.abs().max() < 1e-12
    assert bias.detach().softmax(0)[-1] == pytest.approx(0.95)


@pytest.mark.parametrize('values', [(0, 10, 3), (11, 10, 3), (1, 10, 0), (1, math.inf, 3)])
def test_impossible_counts_are_refused(values):
    with pytest.raises(InputError, match='at least one class and 0 < foreground'):
        optimal_prior(*values)


def test_impossible_priors_are_refused():
    with pytest.raises(InputError, match=r'\(0, 1\), found 0'):
        sigmoid_bias(0)
    with pytest.raises(InputError, match=r'3 classes.*found 1\.2'):
        softmax_biases(0.4, 3)
