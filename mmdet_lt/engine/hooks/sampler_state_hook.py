"""Keep the order of the training data over a resume."""

from __future__ import annotations

import logging
from typing import Any

from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop, Runner

from mmdet_lt.engine.loops.positions import loader_sampler, samples_before
from mmdet_lt.errors import InputError
from mmdet_lt.registry import HOOKS

KEY = 'mmdet_lt_sampler'


@HOOKS.register_module()
class SamplerStateHook(Hook):
    """Store the state of the training sampler in checkpoints and restore it on resume.

    MMEngine builds the data loader, with a newly drawn seed where the config has none, before it
    reads the checkpoint. This hook puts the seed of the checkpoint back, and the switch of a
    deferred sampler, and refuses to go on with another sampler: another type, other parameters,
    other data. Samplers without ``state_dict()`` (MMEngine's) are noted by type only.

    It also compares the horizon of progressive samplers with the training loop.

    Raises:
        InputError: On resume, when the sampler differs from that of the checkpoint; before
            training, when a progressive sampler counts epochs in an iteration loop.
    """

    priority = 'HIGH'

    def before_train(self, runner: Runner) -> None:
        """Check that the horizon of a progressive sampler is that of the training."""
        loader, loop = runner.train_dataloader, runner.train_loop
        sampler = loader_sampler(loader)
        epochs, samples = (getattr(sampler, key, None) for key in ('max_epochs', 'max_samples'))
        total = samples_before(loader, loop.max_iters) * get_dist_info()[1]
        if epochs is not None and isinstance(loop, IterBasedTrainLoop):
            raise InputError(
                f'`train_dataloader.sampler.max_epochs` of {type(sampler).__name__} needs an epoch '
                f'loop, found {type(loop).__name__} of {loop.max_iters} iterations: write '
                f'`max_samples={total}` in its place.'
            )
        for key, here, end in (('epochs', epochs, loop.max_epochs), ('samples', samples, total)):
            if here is not None and abs(here - end) > 0.05 * end:
                print_log(
                    f'{type(sampler).__name__} reaches its end after max_{key}={here}, training '
                    f'after {end} {key}.',
                    logger='current',
                    level=logging.WARNING,
                )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the state under the key ``mmdet_lt_sampler``."""
        sampler = loader_sampler(runner.train_dataloader)
        own = hasattr(sampler, 'state_dict')
        checkpoint[KEY] = sampler.state_dict() if own else dict(type=type(sampler).__name__)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Restore the state, on resume only."""
        if not runner._resume:
            return
        sampler, state = loader_sampler(runner.train_dataloader), checkpoint.get(KEY)
        name = type(sampler).__name__
        if state is None:
            print_log(
                f'The checkpoint holds no sampler state (it was written without SamplerStateHook): '
                f'{name} goes on with seed {getattr(sampler, "seed", None)}.',
                logger='current',
                level=logging.WARNING,
            )
        elif state.get('type') != name:
            raise InputError(
                f'the checkpoint was trained with {state.get("type")}, and '
                f'`train_dataloader.sampler` is now {name}: resume with the same sampler, or start '
                'a new run with `load_from`.'
            )
        elif hasattr(sampler, 'load_state_dict'):
            before = sampler.seed
            sampler.load_state_dict(state)
            if sampler.seed != before:
                print_log(f'{name} goes on with seed {sampler.seed} of the checkpoint.', 'current')
