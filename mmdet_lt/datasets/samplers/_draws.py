"""Turn expected numbers of draws into whole numbers of draws."""

from __future__ import annotations

import numpy as np

from mmdet_lt.errors import InputError


def draw_repeats(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Round each factor up or down at random with the right mean; the total stays within one.

    Systematic sampling: with one uniform offset ``u``, image ``k`` of a random order gets
    ``floor(S_k + u) - floor(S_{k-1} + u)`` draws, ``S`` the cumulative sum. Each image has the same
    distribution as under independent rounding (``floor`` plus a coin of the fraction), but the
    length of the epoch is constant, which learning-rate schedules need.

    Returns:
        Draws of each image, int64, summing to ``floor(sum)`` or ``ceil(sum)``.
    """
    order = rng.permutation(len(factors))
    edges = np.floor(np.cumsum(factors[order]) + rng.random()).astype(np.int64)
    repeats = np.empty(len(factors), dtype=np.int64)
    repeats[order] = np.diff(edges, prepend=0)
    return repeats


def draw_list(factors: np.ndarray, rng: np.random.Generator, shuffle: bool) -> np.ndarray:
    """Image indices, each as often as :func:`draw_repeats` says, int64 (about the sum,)."""
    indices = np.repeat(np.arange(len(factors)), draw_repeats(factors, rng))
    return rng.permutation(indices) if shuffle else indices


def cap_draws(expected: np.ndarray, limit: float | None) -> np.ndarray:
    """Cap expected draws and hand the excess to the images below the cap, in proportion.

    Args:
        expected: Expected draws of each image, float64 (num_images,).
        limit: Largest value allowed, or None.

    Returns:
        float64 (num_images,), with the same sum.

    Raises:
        InputError: Even with every drawn image at the limit the epoch is not filled.
    """
    if limit is None:
        return expected
    total, drawn = expected.sum(), int(np.count_nonzero(expected))
    if limit * drawn < total * (1 - 1e-9):
        raise InputError(
            f'`train_dataloader.sampler.max_repeats` must be at least {total / drawn:.3f}: '
            f'{drawn} images with boxes have to fill {total:.0f} draws, found {limit}.'
        )
    result, full = expected.copy(), np.zeros(len(expected), dtype=bool)
    while (over := (result > limit * (1 + 1e-12)) & ~full).any():
        full |= over
        result[full] = limit
        rest = expected[~full].sum()
        if rest > 0:
            result[~full] = expected[~full] * (total - limit * full.sum()) / rest
    return result
