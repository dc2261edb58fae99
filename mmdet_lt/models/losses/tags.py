"""What a loss says about itself to the tests, the documentation and the tools."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LossTags:
    """Facts about one loss; the contract tests and the catalogue of the docs read them.

    Attributes:
        title: Name of the method in its field, such as 'Equalization loss v2'.
        paper: Venue and year, such as 'CVPR 2021'.
        url: Address of the paper.
        statistics: Needs class statistics before the first call.
        running: Learns from what it has seen (:class:`RunningStatistics`).
        stochastic: Draws random numbers in a training step.
        own_normalizer: The method defines its own divisor, ``avg_factor`` has no effect.
        bounded_logits: Logits are cosines or are clamped: the gradient may vanish at large ones.
        variants: Further sets of arguments that the contract tests try.
    """

    title: str
    paper: str
    url: str
    statistics: bool = False
    running: bool = False
    stochastic: bool = False
    own_normalizer: bool = False
    bounded_logits: bool = False
    variants: tuple[dict[str, Any], ...] = field(default=())
