r"""Bias of a classifier whose first loss is the smallest one that a constant output can have.

Paper: Chen et al., *Is Sampling Heuristics Necessary in Training Deep Object Detectors?*,
https://arxiv.org/abs/1909.04868.

``N`` rows (anchors, points or proposals that the loss receives with a weight above 0), ``N_f``
foreground ones, ``C`` classes.

.. math::
    \pi = \frac{N_f}{N C}, \qquad b_{sigmoid} = -\log\frac{1 - \pi}{\pi}
        = -\log\Big(\frac{N C}{N_f} - 1\Big), \qquad
    b_{bg} - b_{fg} = \log\Big(\Big(\frac{N}{N_f} - 1\Big) C\Big)

``π`` minimises ``-log π - (N C / N_f - 1) log(1 - π)``, the binary cross entropy of a foreground
row and its share of the other entries. The softmax form gives each class the probability
``N_f / (N C)`` and background the rest.
"""

from __future__ import annotations

import math

from mmdet_lt.errors import InputError


def optimal_prior(num_fg: float, num_rows: float, num_classes: int) -> float:
    """``π = N_f / (N C)``.

    Args:
        num_fg: Foreground rows, ``N_f``.
        num_rows: Foreground and background rows, ``N``; ignored rows are not counted.
        num_classes: ``C``.

    Raises:
        InputError: No foreground, more foreground than rows, or no class.
    """
    if not (num_classes >= 1 and 0 < num_fg <= num_rows < math.inf):
        raise InputError(
            'the optimal prior needs at least one class and 0 < foreground rows <= rows, found '
            f'{num_classes} classes, {num_fg:g} foreground rows and {num_rows:g} rows: the '
            'training data must hold objects that the assigner matches.'
        )
    return num_fg / (num_rows * num_classes)


def sigmoid_bias(prior: float) -> float:
    """``-log((1 - π) / π)``, the bias at which a sigmoid gives ``π``.

    Raises:
        InputError: ``π`` is not in (0, 1).
    """
    if not 0 < prior < 1:
        raise InputError(
            f'the prior of a sigmoid classifier must lie in (0, 1), found {prior:g}: correct '
            '`model.sampling_free.prior`.'
        )
    return math.log(prior) - math.log1p(-prior)


def softmax_biases(prior: float, num_classes: int) -> tuple[float, float]:
    """``(b_fg, b_bg)`` that give each class the probability ``π`` and background ``1 - C π``.

    ``b_fg`` is 0: a softmax knows differences only.

    Raises:
        InputError: ``C π`` is not in (0, 1).
    """
    foreground = prior * num_classes
    if not 0 < foreground < 1:
        raise InputError(
            f'the prior times the {num_classes} classes of a softmax classifier must lie in '
            f'(0, 1), found {foreground:g}: correct `model.sampling_free.prior`.'
        )
    return 0.0, math.log1p(-foreground) - math.log(prior)
