r"""Classifiers that only change how long the weights of each class are: LWS and τ-normalisation.

Paper: Kang et al., *Decoupling Representation and Classifier for Long-Tailed Recognition*,
ICLR 2020, https://arxiv.org/abs/1910.09217. Authors' code:
https://github.com/facebookresearch/classifier-balancing.

.. math::
    \text{LWS:}\quad z_k = s_k \, w_k^\top x + b_k, \qquad
    \text{τ-norm:}\quad z_k = \frac{w_k^\top x}{\|w_k\|^{\tau}} + b_k

Both take the weights of a trained classifier as they are; their parameters are named as those of
``Linear``, so any checkpoint loads. LWS learns ``s`` (K numbers, from 1) in a second stage,
τ-normalisation learns nothing and is for testing.

Differs from the authors' code: the bias, which they drop (τ-norm) or scale along (LWS), stays as
trained, so that ``τ = 0`` and ``s = 1`` are the original classifier. A detector also has columns
without a class: see ``keep_last``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.ops.sigmoid import compute_dtype
from mmdet_lt.registry import MODELS


def tau_normalize(weight: Tensor, tau: float, keep_last: int = 0) -> Tensor:
    """``w_k / ||w_k||^tau`` for all but the last ``keep_last`` rows of (K, D), in float32.

    A row of zeros stays one.
    """
    weight = weight.to(compute_dtype(weight))
    factor = weight.norm(dim=1, keepdim=True).clamp_min(1e-12).pow(-tau)
    if keep_last:
        factor = torch.cat([factor[:-keep_last], torch.ones_like(factor[-keep_last:])])
    return weight * factor


@MODELS.register_module()
class ScaledLinear(nn.Linear):
    """Learnable weight scaling (LWS), see the formula above.

    ``weight`` (K, D) and ``bias`` (K,) do not learn, only ``scale`` (K,) does. For a second stage:
    ``ClassifierInitHook(mode='keep')`` makes sure that a trained classifier is there.

    Args:
        in_features: D; heads set it.
        out_features: K; heads set it.
        bias: Whether the trained classifier has a bias.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, K), of features (N, D)."""
        logits = F.linear(x, self.weight) * self.scale
        return logits if self.bias is None else logits + self.bias


@MODELS.register_module()
class TauNormLinear(nn.Linear):
    """τ-normalised classifier, see the formula above. For testing: a checkpoint brings the weights.

    Args:
        in_features: D; heads set it.
        out_features: K; heads set it.
        bias: Whether the trained classifier has a bias.
        tau: ``τ``: 0 leaves the classifier as it is, 1 makes all weights equally long.
        keep_last: Columns at the end that keep their weights: 1 for background or objectness, 2
            for the objectness of Seesaw, 0 where every column is a class.

    Raises:
        InputError: ``tau`` is negative, or ``keep_last`` leaves no class.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        tau: float = 1.0,
        keep_last: int = 1,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        if not (isinstance(tau, (int, float)) and 0 <= tau < math.inf):
            raise InputError(
                '`cls_predictor_cfg.tau` of TauNormLinear must be a number of at least 0, found '
                f'{tau!r}.'
            )
        if type(keep_last) is not int or not 0 <= keep_last < out_features:
            raise InputError(
                '`cls_predictor_cfg.keep_last` of TauNormLinear must be a whole number of at least '
                f'0 and leave a class: found {keep_last!r} of {out_features} columns.'
            )
        self.tau, self.keep_last = tau, keep_last

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, K), of features (N, D).

        Raises:
            InputError: The layer is trained.
        """
        if self.training and torch.is_grad_enabled():
            raise InputError(
                'TauNormLinear is for testing a trained classifier: to train one, use another '
                '`cls_predictor_cfg` (mmdet_lt.ScaledLinear learns the lengths, '
                'mmdet_lt.CosineLinear has none).'
            )
        weight = tau_normalize(self.weight, self.tau, self.keep_last)
        return F.linear(x, weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, tau={self.tau}, keep_last={self.keep_last}'
