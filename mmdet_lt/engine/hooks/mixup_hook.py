"""Input and manifold mixup of detection batches, with a mute for the end of training."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmengine.dist import get_dist_info
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from mmdet_lt.engine.hooks._boundary import Boundary
from mmdet_lt.errors import InputError
from mmdet_lt.models.data_preprocessors.mixup import Mix, blend, draw_mix, mix_samples
from mmdet_lt.models.task_modules.box_weights import (
    FIELD,
    disable_box_weights,
    enable_box_weights,
    set_box_weights,
)
from mmdet_lt.registry import HOOKS
from mmdet_lt.utils.modules import bare_model


@HOOKS.register_module()
class MixupHook(Hook):
    """Blend each training image with another one of its batch and weight their boxes.

    Formula and references: :mod:`mmdet_lt.models.data_preprocessors.mixup`; what the weights do in
    each head: :mod:`mmdet_lt.models.task_modules.box_weights`. The batch is mixed on its device,
    after normalisation and padding, so neither pipeline nor workers know of it. ``λ`` and partners
    follow from seed, rank and iteration alone: a resumed run draws what an unbroken one would.

    Args:
        alpha: Parameter of ``Beta(alpha, alpha)``.
        layer: None blends the images. A name like ``'backbone.layer2'`` or ``'neck'`` blends the
            output of that module instead (manifold mixup).
        mute_epoch: First epoch without mixup, counted from 0; 0 never mixes.
        mute_iteration: The same in iterations; at most one of them.

    Raises:
        InputError: A head, loss or detector that cannot weight single boxes, a batch size below 2,
            an unknown layer, a mute past the end of training.
    """

    def __init__(
        self,
        alpha: float = 1.5,
        layer: str | None = None,
        mute_epoch: int | None = None,
        mute_iteration: int | None = None,
    ) -> None:
        if not 0 < alpha < float('inf'):
            raise InputError(f'`MixupHook.alpha` must be a number above 0, found {alpha!r}.')
        self.alpha, self.layer = alpha, layer
        self.mute: Boundary | None = None
        if mute_epoch is not None or mute_iteration is not None:
            self.mute = Boundary('MixupHook', mute_epoch, mute_iteration, prefix='mute_')
        self._muted: bool | None = None
        self._seed: tuple[int, ...] = ()
        self._mix: Mix | None = None
        self._blended = False
        self._heads: list[nn.Module] = []
        self._handles: list[Any] = []

    # ---- set-up ----------------------------------------------------------------------------

    def before_train(self, runner: Runner) -> None:
        """Check everything, then hook into the model; here EMA has made its copy already."""
        model = bare_model(runner.model)
        if self.mute is not None:
            self.mute.check(runner)
        _check_batch_size(runner)
        if not isinstance(model.data_preprocessor, DetDataPreprocessor):
            raise InputError(
                'MixupHook needs `model.data_preprocessor.type="DetDataPreprocessor"`, found '
                f'{type(model.data_preprocessor).__name__}.'
            )
        layer = None if self.layer is None else self._find_layer(model)
        self._heads = enable_box_weights(model)
        hook = model.data_preprocessor.register_forward_hook(self._mix_batch, with_kwargs=True)
        self._handles = [hook]
        if layer is not None:
            self._handles.append(layer.register_forward_hook(self._mix_features))
        self._muted = None

    def _find_layer(self, model: nn.Module) -> nn.Module:
        parts = {name.split('.')[0] for name, _ in model.named_modules()} & {'backbone', 'neck'}
        names = [name for name, _ in model.named_modules() if name.split('.')[0] in parts]
        if self.layer not in names:
            shown = [name for name in names if name.count('.') <= 1]
            raise InputError(
                '`MixupHook.layer` must name a module of the backbone or neck, such as '
                f'{", ".join(shown)}; found {self.layer!r}.'
            )
        return model.get_submodule(self.layer)

    # ---- every iteration -------------------------------------------------------------------

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Mix or not, and with which random numbers."""
        muted = self.mute is not None and self.mute.reached(runner)
        if muted != self._muted:
            state = 'off' if muted else 'on'
            end = '' if self.mute is None else f' (it ends with the start of {self.mute})'
            print_log(f'Mixup is {state}{end}', logger='current')
        self._muted = muted
        self._seed = (runner.seed, get_dist_info()[0], runner.iter)
        self._blended = False

    def _mix_batch(self, module: nn.Module, args: tuple, kwargs: dict, output: dict) -> None:
        """After the data preprocessor: mix the samples, and the pixels for input mixup."""
        training = kwargs.get('training', args[1] if len(args) > 1 else False)
        if not training or self._muted:
            return
        samples = output['data_samples']
        self._mix = draw_mix(np.random.default_rng(self._seed), self.alpha, len(samples))
        mix_samples(samples, self._mix)
        set_box_weights(self._heads, [sample.gt_instances[FIELD] for sample in samples])
        if self.layer is None:
            output['inputs'] = blend(output['inputs'], self._mix)
            self._blended = True

    def _mix_features(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After the chosen layer; validation and muted batches have no mix."""
        if self._mix is None:
            return output
        self._blended = True
        return blend(output, self._mix)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Forget the mix; validation must not see it."""
        if self._mix is not None and not self._blended:
            raise InputError(
                f'`MixupHook.layer={self.layer!r}` took no part in the forward pass, so boxes were '
                'mixed without features: name a layer that the detector runs.'
            )
        self._mix = None
        set_box_weights(self._heads, None)

    def after_train(self, runner: Runner) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        disable_box_weights(self._heads)
        self._handles, self._heads = [], []


def _check_batch_size(runner: Runner) -> None:
    loader = runner.train_dataloader
    size = loader.batch_size or loader.batch_sampler.batch_size
    if size < 2:
        raise InputError(
            'MixupHook blends the images of a batch, so `train_dataloader.batch_size` must be at '
            f'least 2, found {size}.'
        )
