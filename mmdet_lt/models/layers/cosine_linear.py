r"""Cosine classifier: the length of a class's weights no longer tells how frequent it is.

Paper: Gidaris and Komodakis, *Dynamic Few-Shot Visual Learning without Forgetting*, CVPR 2018,
https://arxiv.org/abs/1804.09458.

.. math::
    z_k = T \, \frac{w_k^\top x}{\|w_k\| \, \|x\|} + b_k

Trained with few samples the weights of a rare class stay short, so a dot product ranks it low
whatever it sees. Here all weights have length 1 and ``T`` sets the range of the logits.

``NormedLinear`` of MMDetection is the fixed-temperature case; the name of its key differs between
MMDetection 3.3 and its fork, so configs that use it run on one of them only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.ops.sigmoid import compute_dtype
from mmdet_lt.registry import MODELS


def cosine_logits(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Cosines of rows and classes, (N, K), in at least float32; 0 where one of both has length 0.

    Args:
        x: Features, (N, D), any floating dtype.
        weight: Classifier, (K, D).
        eps: Least length that is divided by.
    """
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        rows = F.normalize(x.to(dtype), dim=-1, eps=eps)
        return F.linear(rows, F.normalize(weight.to(dtype), dim=-1, eps=eps))


@MODELS.register_module()
class CosineLinear(nn.Linear):
    """Cosine classifier, see the formula above: a drop-in ``cls_predictor_cfg``.

    The parameters ``weight`` (K, D) and ``bias`` (K,) are named as in ``Linear``. With
    ``learnable`` the temperature is ``temperature * exp(log_scale)``: it stays positive, and weight
    decay pulls it to where it began.

    Args:
        in_features: D; heads set it.
        out_features: K; heads set it.
        bias: Add ``b``, which the prior of a head needs.
        temperature: ``T``, or where it begins. Above 0; 1 for losses that scale the cosines
            themselves (LDAM).
        learnable: Learn the temperature.
        eps: Least length that is divided by.

    Raises:
        InputError: ``temperature`` or ``eps`` is not above 0.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        temperature: float = 20.0,
        learnable: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        for key, value in dict(temperature=temperature, eps=eps).items():
            if not (isinstance(value, (int, float)) and 0 < value < float('inf')):
                raise InputError(
                    f'`cls_predictor_cfg.{key}` of CosineLinear must be a number above 0, found '
                    f'{value!r}.'
                )
        self.start, self.eps = float(temperature), eps
        if learnable:
            self.log_scale = nn.Parameter(torch.zeros(()))

    @property
    def temperature(self) -> float | Tensor:
        """``T``: a number, or a 0-d tensor in the graph where it is learned."""
        return self.start * self.log_scale.exp() if hasattr(self, 'log_scale') else self.start

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (N, K), in at least float32, of features (N, D)."""
        logits = cosine_logits(x, self.weight, self.eps) * self.temperature
        return logits if self.bias is None else logits + self.bias

    def extra_repr(self) -> str:
        learned = ', learnable' if hasattr(self, 'log_scale') else ''
        return f'{super().extra_repr()}, temperature={self.start}{learned}'
