"""Cosine, scaled and tau-normalised classifiers: numbers worked out by hand."""

import math

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.cosine_linear import CosineLinear
from mmdet_lt.models.layers.weight_scaling import ScaledLinear, TauNormLinear, tau_normalize

# Lengths 5, 1 and 13.
WEIGHT = torch.tensor([[3.0, 4.0], [0.0, 1.0], [5.0, 12.0]])
BIAS = torch.tensor([0.5, -0.5, 0.25])
X = torch.tensor([[4.0, 3.0], [0.0, 2.0]])  # lengths 5 and 2


def filled(layer):
    state = dict(weight=WEIGHT, bias=BIAS)
    missing = layer.load_state_dict(state, strict=False)  # the checkpoint of a plain Linear
    assert not missing.unexpected_keys
    return layer


def test_cosine_scores_by_hand():
    layer = filled(CosineLinear(2, 3, temperature=10.0))
    cosines = [
        [(4 * 3 + 3 * 4) / 25, 3 / 5, (4 * 5 + 3 * 12) / (5 * 13)],
        [4 / 5, 1.0, 12 / 13],
    ]
    expected = torch.tensor(cosines) * 10 + BIAS
    torch.testing.assert_close(layer(X), expected)
    # Neither the length of the features nor that of a class's weights matters.
    layer.weight.data[1] *= 100
    torch.testing.assert_close(layer(X * 7), expected)


def test_cosine_is_the_stock_layer_at_its_temperature():
    stock = MODELS.build(dict(type='NormedLinear', in_features=6, out_features=4))
    ours = MODELS.build(dict(type='mmdet_lt.CosineLinear', in_features=6, out_features=4))
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-3, atol=1e-3)  # it divides by |w| + 1e-6


def test_temperature_learns_and_stays_positive():
    layer = filled(CosineLinear(2, 3, temperature=10.0, learnable=True))
    layer(X).sum().backward()
    # dL/dT * T, since log_scale = log(T / 10)
    cosines = (layer(X) - BIAS) / 10
    assert layer.log_scale.grad.item() == pytest.approx(10 * cosines.sum().item(), rel=1e-5)
    layer.log_scale.data.fill_(-50.0)
    assert layer.temperature > 0
    assert 'log_scale' not in CosineLinear(2, 3).state_dict()


def test_zero_features_and_half_precision_are_finite():
    layer = filled(CosineLinear(2, 3))
    x = torch.zeros(1, 2, requires_grad=True)
    layer(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.equal(layer(x)[0], BIAS)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        # The squares of these features are beyond half precision.
        out = layer((X * 300).half())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, layer(X), rtol=1e-3, atol=1e-3)


def test_scaled_linear_by_hand():
    layer = filled(ScaledLinear(2, 3))
    plain = nn.functional.linear(X, WEIGHT, BIAS)
    torch.testing.assert_close(layer(X), plain)
    layer.scale.data = torch.tensor([2.0, 0.5, 1.0])
    expected = torch.tensor(
        [[24 * 2 + 0.5, 3 * 0.5 - 0.5, 56 + 0.25], [8 * 2 + 0.5, 2 * 0.5 - 0.5, 24 + 0.25]]
    )
    torch.testing.assert_close(layer(X), expected)
    # The same as scaled weights, which is what the paper writes.
    scaled = nn.functional.linear(X, WEIGHT * layer.scale[:, None], BIAS)
    torch.testing.assert_close(layer(X), scaled)
    layer(X).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    torch.testing.assert_close(layer.scale.grad, (X @ WEIGHT.T).sum(0))


@pytest.mark.parametrize('tau', [0.0, 0.5, 1.0])
def test_tau_normalisation_by_hand(tau):
    lengths = (5.0, 1.0, 13.0)
    expected = torch.stack([row / length**tau for row, length in zip(WEIGHT, lengths, strict=True)])
    torch.testing.assert_close(tau_normalize(WEIGHT, tau), expected)
    layer = filled(TauNormLinear(2, 3, tau=tau, keep_last=1)).eval()
    expected[-1] = WEIGHT[-1]
    torch.testing.assert_close(layer(X), X @ expected.T + BIAS)
    assert torch.equal(layer.state_dict()['weight'], WEIGHT)


def test_tau_of_an_empty_class_is_finite():
    assert torch.equal(tau_normalize(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))


def test_tau_normalised_classifier_is_not_trained():
    layer = TauNormLinear(2, 3)
    with pytest.raises(InputError, match='for testing.*cls_predictor_cfg'):
        layer(X)
    with torch.no_grad():
        assert layer(X).shape == (2, 3)


@pytest.mark.parametrize(
    ('build', 'key'),
    [
        (lambda: CosineLinear(2, 3, temperature=0.0), 'temperature'),
        (lambda: CosineLinear(2, 3, temperature=math.inf), 'temperature'),
        (lambda: CosineLinear(2, 3, eps=-1.0), 'eps'),
        (lambda: TauNormLinear(2, 3, tau=-0.1), 'tau'),
        (lambda: TauNormLinear(2, 3, keep_last=3), 'keep_last'),
        (lambda: CosineLinear(2, 3, temperature='20'), 'temperature'),
        (lambda: CosineLinear(2, 3, eps=None), 'eps'),
        (lambda: TauNormLinear(2, 3, tau='1'), 'tau'),
        (lambda: TauNormLinear(2, 3, keep_last=1.5), 'keep_last'),
    ],
)
def test_bad_arguments(build, key):
    with pytest.raises(InputError, match=rf'cls_predictor_cfg\.{key}'):
        build()
