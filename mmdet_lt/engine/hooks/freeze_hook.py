"""Train some parts of a model and leave the rest exactly as it is."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdet_lt.errors import InputError
from mmdet_lt.registry import HOOKS
from mmdet_lt.utils.modules import bare_model
from mmdet_lt.utils.patterns import check_patterns, is_named


@HOOKS.register_module()
class FreezeHook(Hook):
    """Freeze all but the named parts of the model while it trains.

    Frozen parameters get no gradient, so neither the optimiser nor its weight decay or momentum
    moves them. Frozen normalisation layers (batch norm of any kind, instance norm with statistics)
    stay in evaluation mode: they use and keep the statistics of the checkpoint. A named part stays
    as it is: what a model froze by itself (``frozen_stages``, the weights of ``ScaledLinear``) is
    not thawed. Running statistics of a loss are no part of the network and go on learning. Averages
    of frozen parts (``EMAHook``) are the parts themselves: some averages of equal numbers are not
    equal to them in the last bit.

    MMEngine wraps the model for distributed training before any hook can act; the wrapper then
    waits for gradients of frozen parameters. So the hook has the model wrapped again.

    Args:
        trainable: Names of modules or parameters that train, with everything in them;
            ``*`` stands for anything: ``roi_head.bbox_head.fc_cls``, ``*.fc_cls``.

    Raises:
        InputError: A name matches nothing or only what the model froze by itself, or the model is
            in a wrapper other than DistributedDataParallel.
    """

    priority = 'VERY_HIGH'

    def __init__(self, trainable: str | Sequence[str]) -> None:
        self.trainable = trainable
        self._patterns: tuple[str, ...] = ()
        self._norms: dict[str, nn.Module] = {}

    def before_run(self, runner: Runner) -> None:
        """Freeze, once the optimiser exists and before weights are loaded."""
        if not isinstance(runner._train_loop, BaseLoop):  # a test run has nothing to freeze
            return
        self._freeze(bare_model(runner.model))
        if is_model_wrapper(runner.model):
            _wrap_again(runner)
        # Not before: wrapping with `sync_bn` replaces batch norm layers.
        self._norms = self._frozen_norms(bare_model(runner.model))

    def check_model(self, model: nn.Module) -> list[str]:
        """Names of the parameters that will train.

        Raises:
            InputError: A name of ``trainable`` matches nothing, or nothing that can train.
        """
        names = [name for name, _ in model.named_parameters()]
        patterns = self._patterns = check_patterns(self.trainable, names, 'FreezeHook.trainable')
        free = [name for name, p in model.named_parameters() if p.requires_grad]
        for pattern in patterns:
            if not any(is_named(name, [pattern]) for name in free):
                raise InputError(
                    f'`FreezeHook.trainable` names {pattern!r}, which leaves nothing to train: the '
                    'parameters it names are frozen by the model itself (`frozen_stages`, the '
                    'weights of ScaledLinear); name others.'
                )
        return [name for name in free if is_named(name, patterns)]

    def _freeze(self, model: nn.Module) -> None:
        left = self.check_model(model)
        parameters = dict(model.named_parameters())
        for name in parameters.keys() - set(left):
            parameters[name].requires_grad_(False)
            parameters[name].grad = None
        shown = ', '.join(left[:5]) + (f' and {len(left) - 5} more' if len(left) > 5 else '')
        print_log(f'{len(left)} of {len(parameters)} parameters train: {shown}', 'current')

    def _frozen_norms(self, model: nn.Module) -> dict[str, nn.Module]:
        """The normalisation layers to be kept in evaluation mode."""
        return {
            name: module
            for name, module in model.named_modules()
            if hasattr(module, 'running_mean') and not is_named(name, self._patterns)
        }

    def before_train(self, runner: Runner) -> None:
        """Take what is frozen out of the averages of ``EMAHook``, with its value."""
        model = bare_model(runner.model)
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        for name, norm in self._norms.items():
            frozen.update({f'{name}.{key}': value for key, value in norm.named_buffers()})
        for hook in runner.hooks:
            averages = getattr(getattr(hook, 'ema_model', None), 'avg_parameters', {})
            for name in frozen.keys() & averages.keys():
                averages.pop(name).data.copy_(frozen[name].data)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Undo what the loop's ``model.train()`` did to frozen normalisation layers."""
        for module in self._norms.values():
            module.eval()


def _wrap_again(runner: Runner) -> None:
    if not isinstance(runner.model, DistributedDataParallel):
        raise InputError(
            'FreezeHook works with DistributedDataParallel, found '
            f'{type(runner.model).__name__}: change `model_wrapper_cfg`.'
        )
    runner.model = runner.model.module
    gc.collect()  # the old wrapper must be gone, or it goes on listening to the parameters
    runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), runner.model)
