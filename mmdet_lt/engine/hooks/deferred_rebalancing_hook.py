"""Deferred re-balancing: plain training first, then re-sampling (DRS) or re-weighting (DRW).

Papers: Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*,
NeurIPS 2019, https://arxiv.org/abs/1906.07413 (DRW); Zhang et al., *Bag of Tricks for Long-Tailed
Visual Recognition with Deep Convolutional Neural Networks*, AAAI 2021 (DRS).

The published codes disagree by one about what the switch epoch means; here there is one rule for
sampler and loss: ``epoch=8`` leaves the epochs 0 .. 7 plain and re-balances from epoch 8 on, which
logs call ``Epoch [9]``.
"""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch import nn
from torch.utils.data import DataLoader

from mmdet_lt.engine.hooks._boundary import Boundary
from mmdet_lt.engine.loops.iter_based_train_loop import IterBasedTrainLoop as ResumableLoop
from mmdet_lt.engine.loops.iter_based_train_loop import _empty_buckets
from mmdet_lt.engine.loops.positions import loader_sampler, samples_before
from mmdet_lt.errors import InputError
from mmdet_lt.registry import HOOKS
from mmdet_lt.utils.modules import bare_model


@HOOKS.register_module()
class DeferredRebalancingHook(Hook):
    """Switch a sampler and/or losses from plain to re-balanced at an epoch or an iteration.

    The sampler is told once, before training: ``sampler.defer_until(epoch=E)`` or
    ``defer_until(num_samples=S)``, ``S`` the samples of this rank before the boundary. It counts
    positions of its own stream, so batches that workers have fetched ahead and workers that live
    through all epochs change nothing. Losses and other modules of the model with the method
    ``set_rebalancing(active)`` are switched at the boundary. Both sides follow from the epoch and
    iteration alone, so a run may be resumed before or after the boundary and is equal on all ranks.

    Args:
        epoch: First re-balanced epoch, counted from 0; for epoch loops.
        iteration: First re-balanced iteration (batch of one rank), counted from 0; for both loops.
        sampler: Switch the sampler of ``train_dataloader``: True, False, or None for "if it can".
        loss: Switch the modules of the model: True, False, or None for "if there are any".

    Raises:
        InputError: Not exactly one of ``epoch`` and ``iteration``, a boundary past the end of
            training or of the wrong unit, nothing that can be switched.
    """

    def __init__(
        self,
        epoch: int | None = None,
        iteration: int | None = None,
        sampler: bool | None = None,
        loss: bool | None = None,
    ) -> None:
        self.boundary = Boundary('DeferredRebalancingHook', epoch, iteration)
        if sampler is False and loss is False:
            raise InputError(
                '`DeferredRebalancingHook.sampler` and `.loss` are both False, so there is nothing '
                'to switch: remove one of them or the hook.'
            )
        self.sampler, self.loss = sampler, loss
        self._active: bool | None = None
        self._modules: dict[str, nn.Module] = {}
        self._what = ''

    def before_run(self, runner: Runner) -> None:
        """Check everything and tell the sampler, before the first batch is made."""
        if not isinstance(runner._train_loop, BaseLoop):  # a test run has no training to defer
            return
        self.boundary.check(runner)
        self._check_other_hooks(runner)
        sampler = self._find_sampler(runner.train_dataloader)
        self._modules = self._find_modules(runner.model)
        if sampler is None and not self._modules:
            found = type(loader_sampler(runner.train_dataloader)).__name__
            raise InputError(
                'DeferredRebalancingHook found nothing to switch: expected a re-balancing sampler '
                'of mmdet_lt in `train_dataloader.sampler` or a class-weighted loss of mmdet_lt in '
                f'`model`, found {found} and no module with `set_rebalancing`.'
            )
        if sampler is not None:
            self._defer(sampler, runner.train_loop)
        names = [] if sampler is None else [type(sampler).__name__]
        self._what = ', '.join([*names, *self._modules])

    def before_train(self, runner: Runner) -> None:
        """Bring the losses to the right side; a resumed run may start behind the boundary."""
        self._active = None
        self._switch(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Switch at the boundary."""
        self._switch(runner)

    def _switch(self, runner: Runner) -> None:
        active = self.boundary.reached(runner)
        if active == self._active:
            return
        self._active = active
        for module in self._modules.values():
            module.set_rebalancing(active)
        state = 'Re-balancing is on' if active else 'Re-balancing is off'
        print_log(f'{state} (it starts with {self.boundary}): {self._what}', logger='current')

    # ---- what can be switched --------------------------------------------------------------

    def _find_sampler(self, loader: DataLoader) -> Any:
        sampler = loader_sampler(loader)
        if self.sampler is not False and hasattr(sampler, 'defer_until'):
            return sampler
        if self.sampler:
            raise InputError(
                '`DeferredRebalancingHook.sampler=True` needs a re-balancing sampler of mmdet_lt '
                f'in `train_dataloader.sampler`, found {type(sampler).__name__}.'
            )
        return None

    def _find_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        found = {
            n: m for n, m in bare_model(model).named_modules() if hasattr(m, 'set_rebalancing')
        }
        if self.loss and not found:
            raise InputError(
                '`DeferredRebalancingHook.loss=True` needs a loss that can switch its class '
                'weights in `model`, found no module with `set_rebalancing`.'
            )
        return {} if self.loss is False else found

    def _check_other_hooks(self, runner: Runner) -> None:
        """Two hooks may share the work, but not switch the same thing twice."""
        for other in runner.hooks:
            if other is self or not isinstance(other, DeferredRebalancingHook):
                continue
            for key in ('sampler', 'loss'):
                if getattr(self, key) is not False and getattr(other, key) is not False:
                    raise InputError(
                        f'two DeferredRebalancingHooks switch the {key}: set '
                        f'`DeferredRebalancingHook.{key}=False` in one of them.'
                    )

    # ---- the sampler -----------------------------------------------------------------------

    def _defer(self, sampler: Any, loop: BaseLoop) -> None:
        if self.boundary.epoch is not None:
            sampler.defer_until(epoch=self.boundary.epoch)
        else:
            number = samples_before(loop.dataloader, self.boundary.iteration)
            sampler.defer_until(num_samples=number)
        if isinstance(loop, IterBasedTrainLoop) and not isinstance(loop, ResumableLoop):
            # MMEngine's loop opened its iterator when it was built; workers make it draw batches at
            # once, from a sampler that was not deferred yet. They are thrown away. Our own loop
            # does that by itself.
            loop.dataloader_iterator = None
            _empty_buckets(loop.dataloader.batch_sampler)
            loop.dataloader_iterator = _InfiniteDataloaderIterator(loop.dataloader)
