"""Give every loss the class statistics of the training set, and keep running statistics in step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.dist import broadcast_object_list, get_dist_info
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch import nn

from mmdet_lt.datasets.records import check_images, unwrap_datasets
from mmdet_lt.engine.hooks.class_counts import check_class_counts
from mmdet_lt.engine.hooks.metric_statistics import (
    metrics_without_statistics,
    training_annotation_file,
)
from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.losses.running import RunningStatistics, flush
from mmdet_lt.registry import HOOKS
from mmdet_lt.statistics import GROUPS, ClassStatistics
from mmdet_lt.utils.modules import bare_model


def statistics_users(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module with the marker method, RPN excluded.

    The RPN has one class of its own, whatever the data set holds.
    """
    for name, module in model.named_modules():
        if hasattr(module, 'set_class_statistics') and 'rpn_head' not in name.split('.'):
            yield name, module


def prepare_model(model: nn.Module, stats: ClassStatistics, by_epoch: bool = True) -> None:
    """Check a model that has no weights yet, and give its losses and classifiers the statistics.

    Args:
        model: The detector.
        stats: Those of the training set.
        by_epoch: Whether the training loop counts epochs.

    Raises:
        InputError: As :func:`check_class_counts`.
    """
    check_class_counts(model, stats, by_epoch)
    for name, module in model.named_modules():
        if isinstance(module, LongTailLoss):
            module.where = name
    for name, module in statistics_users(model):
        _set_prior_bias(model, name, module)
        module.set_class_statistics(stats)


@HOOKS.register_module()
class ClassStatisticsHook(Hook):
    """Inject class statistics, check class counts, set prior biases, drive running statistics.

    Before anything is trained it looks whether the images are on disk, counts the classes of
    ``train_dataloader.dataset`` on rank 0, shares the result, and compares the class counts of
    model, loss and data set. Losses with ``prior_prob`` get their ``prior_bias()`` in their
    RoI head's initialisation (a loaded checkpoint still wins). Static statistics are written again
    after a checkpoint was loaded; on resume they must equal those of the checkpoint. Running
    statistics are never touched on resume. Their increments are summed over ranks and applied once
    per optimiser step.

    In a test or validation run, where the training set is not built, heads and losses are compared
    with each other all the same, before the checkpoint is loaded: a head that scores by another
    rule than its loss stops the run, as does a checkpoint with another shape of any tensor.

    Metrics that have no ``class_statistics`` of their own (:class:`LVISMetric`) get the same ones;
    in such a run its annotation file if that is there.

    Args:
        class_statistics: Annotation file, statistics file or dict to use in place of the training
            set's own counts.
        thresholds: ``(a, b)``: rare up to ``a`` images, common up to ``b``.
        reset_running: Forget running statistics of a loaded checkpoint when training starts (not
            on resume), for a second stage on other data.
        interval: Every so many iterations the ratio of positive to negative gradients of each
            frequency group is logged as ``grad_ratio_r/c/f``; 0 switches it off.

    Raises:
        InputError: Class counts disagree, or the statistics are of another data set.
    """

    priority = 'HIGH'

    def __init__(
        self,
        class_statistics: Any = None,
        thresholds: tuple[int, int] | None = None,
        reset_running: bool = False,
        interval: int = 50,
    ) -> None:
        self.source = class_statistics
        self.thresholds = None if thresholds is None else tuple(thresholds)
        self.reset_running = reset_running
        self.interval = interval
        self.statistics: ClassStatistics | None = None
        self._running: list[RunningStatistics] = []
        self._dropped = 0.0

    # ---- set-up ----------------------------------------------------------------------------

    def before_run(self, runner: Runner) -> None:
        """Count, compare and inject before weights are initialised or loaded."""
        # Asking for `runner.train_dataloader` would build it, so a test run must not.
        loop = runner._train_loop
        if not isinstance(loop, BaseLoop):
            # A pair that training would refuse must not be scored either.
            check_class_counts(bare_model(runner.model), None)
            source = self.source or training_annotation_file(runner.cfg)
            for metric in metrics_without_statistics(runner):
                metric.class_statistics = source
            return
        dataset = runner.train_dataloader.dataset
        self.statistics = self._shared_statistics(dataset)
        by_epoch = not isinstance(loop, IterBasedTrainLoop)
        prepare_model(bare_model(runner.model), self.statistics, by_epoch)
        for metric in metrics_without_statistics(runner):
            metric.class_statistics = self.statistics
        print_log(f'{self.statistics} from {self.statistics.source}', logger='current')

    def _shared_statistics(self, dataset: Any) -> ClassStatistics:
        """Count on rank 0 only; every rank gets the result or raises the same error."""
        shared: list[Any] = [None]
        if get_dist_info()[0] == 0:
            try:
                stats = ClassStatistics.from_dataset(dataset, self.thresholds)
                if not stats.instance_count.any():
                    raise InputError(
                        f'{stats.source} has no box of the {stats.num_classes} classes of '
                        '`train_dataloader.dataset`: the names in `metainfo.classes` (or the '
                        'defaults of its type) must be names of `categories` in the file.'
                    )
                for leaf in unwrap_datasets(dataset):
                    if not getattr(leaf, 'require_images', False):  # LVISDataset looked already
                        check_images(leaf)
                if self.source is not None:
                    given = ClassStatistics.from_any(
                        self.source, self.thresholds, 'ClassStatisticsHook.class_statistics'
                    )
                    stats = given.align(stats.classes, 'ClassStatisticsHook.class_statistics')
                shared = [stats]
            except InputError as error:
                shared = [error]
        broadcast_object_list(shared, src=0)
        if isinstance(shared[0], InputError):
            raise shared[0]
        return shared[0]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """In a test run, refuse a checkpoint that would leave parts of the model random."""
        if isinstance(runner._train_loop, BaseLoop):
            return  # a training may well start from other classes
        own = bare_model(runner.model).state_dict()
        for key, tensor in checkpoint.get('state_dict', checkpoint).items():
            name = key.removeprefix('module.')
            if name in own and own[name].shape != tensor.shape:
                raise InputError(
                    f'checkpoint {runner._load_from} is of another model: `{name}` has shape '
                    f'{tuple(tensor.shape)} there and {tuple(own[name].shape)} here; make '
                    '`num_classes` and the widths of `model` those of its training, or name '
                    'another checkpoint.'
                )

    def before_train(self, runner: Runner) -> None:
        """Write static statistics over those of a checkpoint; take over the running ones."""
        model = bare_model(runner.model)
        device = next(model.parameters()).device
        for name, module in statistics_users(model):
            module.to(device)  # buffers that were sized after the model had been moved
            before = {key: value.clone() for key, value in module.named_buffers()}
            module.set_class_statistics(self.statistics)
            if runner._resume:
                _check_unchanged(name, module, before)
            elif self.reset_running and isinstance(module, RunningStatistics):
                module.reset_running()
        self._running = [m for m in model.modules() if isinstance(m, RunningStatistics)]
        for module in self._running:
            module.step_driven = True
        self._warn_about_buffers(runner)

    def _warn_about_buffers(self, runner: Runner) -> None:
        for hook in runner.hooks:
            averages = getattr(hook, 'ema_cfg', None) or {}
            if self._running and averages.get('update_buffers'):
                print_log(
                    'EMAHook averages the running statistics of the loss (update_buffers=True): '
                    'its checkpoints hold averaged gradient sums.',
                    logger='current',
                    level=logging.WARNING,
                )

    # ---- every iteration -------------------------------------------------------------------

    def after_train_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Apply the increments of a finished optimiser step."""
        if not self._running:
            return
        # While gradients accumulate the step is not over: all its batches see the same weights.
        should_update = getattr(runner.optim_wrapper, 'should_update', None)
        if should_update is None or should_update():
            flush(self._running)
        if self.interval and (runner.iter + 1) % self.interval == 0:
            self._log_ratio(runner)
            self._warn_about_dropped()

    def _log_ratio(self, runner: Runner) -> None:
        losses = [m for m in self._running if hasattr(m, 'pos_grad') and hasattr(m, 'neg_grad')]
        if not losses:
            return
        sums = torch.stack([torch.stack([m.pos_grad, m.neg_grad]) for m in losses]).sum(0).cpu()
        for group in GROUPS:
            index = torch.as_tensor(self.statistics.group_index(group))
            if len(index):
                pos, neg = sums[:, index].sum(1).tolist()
                # RuntimeInfoHook logs under `train/`; so the value reaches every backend.
                runner.message_hub.update_scalar(f'train/grad_ratio_{group}', pos / (neg + 1e-10))

    def _warn_about_dropped(self) -> None:
        dropped = torch.stack([m.dropped_increments for m in self._running]).sum().item()
        if dropped > self._dropped:
            print_log(
                f'running statistics skipped {dropped - self._dropped:.0f} updates with NaN or '
                'infinite gradients since the last report; `loss_cls.detect_anomaly=True` stops at '
                'the first.',
                logger='current',
                level=logging.WARNING,
            )
            self._dropped = dropped

    def after_train(self, runner: Runner) -> None:
        """Give the losses back their own stepping."""
        for module in self._running:
            module.step_driven = False


def _set_prior_bias(model: nn.Module, name: str, loss: nn.Module) -> None:
    """Add the prior bias of an RoI classifier to its head's initialisation.

    An entry that overrides ``fc_cls`` alone keeps the other defaults of the head; passing
    ``init_cfg`` in the config would replace them all.
    """
    bias = loss.prior_bias() if hasattr(loss, 'prior_bias') else None
    head = model.get_submodule(name.rpartition('.')[0])
    if bias is None or getattr(loss, 'context', '') != 'roi' or not hasattr(head, 'fc_cls'):
        return
    entries = head.init_cfg or []
    entries = list(entries) if isinstance(entries, (list, tuple)) else [entries]
    override = dict(type='Normal', std=0.01, bias=bias, override=dict(name='fc_cls'))
    head.init_cfg = [*entries, override]


def _check_unchanged(name: str, module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for key, value in module.named_buffers():
        if key in before and not torch.equal(before[key].to(value.device), value):
            raise InputError(
                f'the checkpoint was trained with other class statistics than the training set has '
                f'now (buffer `{name}.{key}` differs): resume with the same '
                '`train_dataloader.dataset`, or start a new run with `load_from`.'
            )
