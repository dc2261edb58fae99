"""The point of training at which a schedule switches, given as an epoch or as an iteration."""

from __future__ import annotations

from dataclasses import dataclass

from mmengine.runner import IterBasedTrainLoop, Runner

from mmdet_lt.errors import InputError


@dataclass(frozen=True)
class Boundary:
    """``epoch=E``: epochs 0 .. E-1 are before it, E and later (in logs: number E+1) after it.

    ``iteration=K``: the first K iterations (batches of one rank) are before it.

    Attributes:
        hook: Name of the hook, for messages.
        epoch, iteration: Exactly one of them, counted from 0.
        prefix: What the config keys start with, ``''`` or ``'mute_'``.
    """

    hook: str
    epoch: int | None
    iteration: int | None
    prefix: str = ''

    def __post_init__(self) -> None:
        for unit in ('epoch', 'iteration'):
            value = getattr(self, unit)
            if value is not None and (type(value) is not int or value < 0):
                raise InputError(
                    f'{self.key(unit)} must be a whole number of at least 0, found {value!r}.'
                )
        if (self.epoch is None) == (self.iteration is None):
            found = 'neither' if self.epoch is None else 'both'
            raise InputError(
                f'{self.key("epoch")} or {self.key("iteration")} must be given and not both, '
                f'found {found}.'
            )

    def key(self, unit: str) -> str:
        """The config key, in back quotes."""
        return f'`{self.hook}.{self.prefix}{unit}`'

    def check(self, runner: Runner) -> None:
        """Raise InputError unless the boundary lies before the end of the runner's training."""
        loop = runner.train_loop
        if self.epoch is not None and isinstance(loop, IterBasedTrainLoop):
            raise InputError(
                f'{self.key("epoch")} needs an epoch loop, found {type(loop).__name__}, where the '
                f'whole training is one epoch: write {self.key("iteration")} (one pass over the '
                f'data has {len(loop.dataloader)} iterations).'
            )
        if self.epoch is not None:
            unit, value, key, end = 'epoch', self.epoch, 'max_epochs', loop.max_epochs
        else:
            unit, value, key, end = 'iteration', self.iteration, 'max_iters', loop.max_iters
        if value >= end:
            raise InputError(
                f'{self.key(unit)} must lie before the end of training, which has {end} {unit}s '
                f'(`train_cfg.{key}`), found {value}.'
            )

    def reached(self, runner: Runner) -> bool:
        """Whether the current iteration is on the far side."""
        if self.epoch is not None:
            return runner.epoch >= self.epoch
        return runner.iter >= self.iteration

    def __str__(self) -> str:
        if self.epoch is not None:
            return f'epoch {self.epoch + 1}'
        return f'iteration {self.iteration + 1}'
