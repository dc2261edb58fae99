"""Take everything but the classifier from a checkpoint, or the classifier as well, for certain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn

from mmdet_lt.errors import InputError
from mmdet_lt.registry import HOOKS
from mmdet_lt.utils.modules import bare_model
from mmdet_lt.utils.patterns import check_patterns, is_named

MODES = ('reinit', 'keep')
#: What a trained classifier consists of; parameters beside them may be new in the second stage.
_WEIGHTS = ('weight', 'bias')


@HOOKS.register_module()
class ClassifierInitHook(Hook):
    """Start a second stage from the checkpoint in ``load_from``, or refuse it.

    MMEngine loads what fits and warns about the rest, so a second stage whose frozen part fits only
    half would train on random features. Here every tensor outside the classifier must be in the
    checkpoint with its shape.

    - ``mode='reinit'``: the classifier starts anew, whatever the checkpoint has; so does the
      running state of its loss. All of the classifier must be free to learn.
    - ``mode='keep'``: weight and bias of the classifier must be there with the right shape.
      Parameters that a second stage adds (``fc_cls.scale`` of LWS) start from their own value;
      those that the first stage had must have a place in the second.
      State of the loss is kept where the new loss has it, too, and must then have its shape.

    Nothing is done in test runs and when a run is resumed.

    Args:
        mode: 'reinit' or 'keep'.
        classifier: Names of the classifier's modules; ``*`` stands for anything. By default those
            of box heads; a dense head needs its own, such as ``bbox_head.retina_cls``.

    Raises:
        InputError: ``mode`` is unknown, ``load_from`` is missing, a name matches nothing, what
            starts anew is frozen, or the checkpoint differs; the sentence names what differs.
    """

    #: Before EMAHook, which copies what is loaded.
    priority = 'VERY_HIGH'

    def __init__(self, mode: str, classifier: str | Sequence[str] = ('*.fc_cls',)) -> None:
        if mode not in MODES:
            raise InputError(f'`ClassifierInitHook.mode` must be one of {MODES}, found {mode!r}.')
        self.mode, self.classifier = mode, classifier

    def before_run(self, runner: Runner) -> None:
        """Refuse a run without a first stage."""
        if not isinstance(runner._train_loop, BaseLoop):
            return
        self.check_model(bare_model(runner.model))
        if not runner._load_from and not runner._resume:
            raise InputError(
                'ClassifierInitHook starts a second stage: name the checkpoint of the first in '
                '`load_from`, found none.'
            )

    def check_model(self, model: nn.Module) -> tuple[str, ...]:
        """The names of ``classifier``.

        Raises:
            InputError: One matches nothing in the model, or names what is frozen and starts anew.
        """
        patterns = check_patterns(
            self.classifier, [*model.state_dict()], 'ClassifierInitHook.classifier'
        )
        for name, parameter in model.named_parameters():
            if self.mode == 'reinit' and not parameter.requires_grad and is_named(name, patterns):
                raise InputError(
                    f"`ClassifierInitHook.mode='reinit'` starts `{name}` anew, which is frozen and "
                    "would stay random: use mode='keep' (ScaledLinear needs it), or name it in "
                    '`FreezeHook.trainable`.'
                )
        return patterns

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare, and in mode 'reinit' take the classifier out of what will be loaded."""
        if runner._resume or not isinstance(runner._train_loop, BaseLoop):
            return
        weights = checkpoint.get('state_dict', checkpoint)
        found = {name.removeprefix('module.'): name for name in weights}
        shapes = {name: weights[key] for name, key in found.items()}
        own = bare_model(runner.model).state_dict()
        is_classifier, is_loss_state = _parts(self.check_model(bare_model(runner.model)), own)
        source = _Source(f'checkpoint {runner._load_from} (`load_from`)', checkpoint, shapes)
        source.check_rest(
            {n: t for n, t in own.items() if not is_classifier(n) and not is_loss_state(n)}
        )
        if self.mode == 'keep':
            source.check_classifier({n: t for n, t in own.items() if is_classifier(n)})
            source.check_nothing_lost(n for n in found if is_classifier(n) and n not in own)
            source.check_loss_state({n: t for n, t in own.items() if is_loss_state(n)})
            return
        dropped = [n for n in found if is_classifier(n) or is_loss_state(n)]
        for name in dropped:
            del weights[found[name]]
        print_log(f'The classifier starts anew; not loaded: {", ".join(dropped)}', 'current')

    def before_train(self, runner: Runner) -> None:
        """A run may ask to resume where there is nothing to resume from."""
        if not runner._has_loaded:
            raise InputError(
                f'nothing was loaded: {runner.work_dir} has no checkpoint to resume from; set '
                '`load_from` to the checkpoint of the first stage and leave out `resume`.'
            )


def _parts(patterns: Sequence[str], own: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Two tests for names: is it of the classifier, is it state of the loss beside it."""
    modules = {name.rpartition('.')[0] for name in own if is_named(name, patterns)}
    losses = tuple(f'{module.rpartition(".")[0]}.loss_cls.'.lstrip('.') for module in modules)
    return (lambda name: is_named(name, patterns)), (lambda name: name.startswith(losses))


class _Source:
    """A checkpoint, compared with parts of the model."""

    def __init__(self, name: str, checkpoint: Mapping[str, Any], shapes: dict[str, Tensor]) -> None:
        self.name, self.shapes = name, shapes
        meta = checkpoint.get('meta') if 'state_dict' in checkpoint else None
        classes = ((meta or {}).get('dataset_meta') or {}).get('classes')
        self.classes = f' of {len(classes)} classes' if classes else ''

    def _other_shape(self, names: Mapping[str, Tensor]) -> str:
        for name, tensor in names.items():
            if name in self.shapes and self.shapes[name].shape != tensor.shape:
                there, here = (tuple(t.shape) for t in (self.shapes[name], tensor))
                return f'`{name}` has shape {there} there and {here} in this model'
        return ''

    def check_rest(self, rest: Mapping[str, Tensor]) -> None:
        missing = [
            n for n in rest if n not in self.shapes and not n.endswith('num_batches_tracked')
        ]
        if missing:
            raise InputError(
                f'{self.name} is of another model: {len(missing)} of the {len(rest)} tensors '
                f'outside the classifier are not in it, such as `{missing[0]}`; name a checkpoint '
                'of the first stage of this model.'
            )
        if differs := self._other_shape(rest):
            raise InputError(
                f'{self.name}{self.classes} does not fit: {differs}; make `num_classes` and the '
                'widths of the config those of the first stage, or name another checkpoint.'
            )

    def check_classifier(self, classifier: Mapping[str, Tensor]) -> None:
        needed = {n: t for n, t in classifier.items() if n.rpartition('.')[2] in _WEIGHTS}
        advice = "or start with `ClassifierInitHook.mode='reinit'`"
        missing = [n for n in needed if n not in self.shapes]
        if missing:
            raise InputError(
                f'{self.name} has no classifier `{missing[0]}` to keep: name a checkpoint with '
                f'one, {advice}.'
            )
        if differs := self._other_shape(needed):
            raise InputError(
                f'the classifier of {self.name}{self.classes} cannot be kept: {differs}; make '
                f'`num_classes` and `loss_cls` fit, {advice}.'
            )
        new = [n for n in classifier if n not in self.shapes]
        print_log(f'The classifier is kept; new in it: {", ".join(new) or "nothing"}', 'current')

    def check_nothing_lost(self, unplaced: Iterable[str]) -> None:
        for name in unplaced:
            raise InputError(
                f'the classifier of {self.name} has `{name}`, which that of this model has not, so '
                'it would not be the one that was trained: make `cls_predictor_cfg` that of the '
                "first stage, or start with `ClassifierInitHook.mode='reinit'`."
            )

    def check_loss_state(self, state: Mapping[str, Tensor]) -> None:
        if differs := self._other_shape(state):
            raise InputError(
                f'{self.name}{self.classes} has statistics of its loss for another class count: '
                f"{differs}; make `num_classes` agree, or use `ClassifierInitHook.mode='reinit'`."
            )
