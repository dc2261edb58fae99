"""Measure the foreground share that each classifier will train on, and set its bias by it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, get_dist_info
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

from mmdet_lt.engine.hooks._decay import exempt_from_decay
from mmdet_lt.engine.hooks._prior_marks import (
    combined_mark,
    data_mark,
    detector_mark,
    weights_mark,
)
from mmdet_lt.engine.hooks._row_counting import batch_size, count_rows
from mmdet_lt.errors import InputError
from mmdet_lt.registry import HOOKS
from mmdet_lt.utils.files import cache_dir, read_json, write_text_atomic
from mmdet_lt.utils.modules import bare_model

FORMAT = 'mmdet_lt.optimal_prior.v1'


@HOOKS.register_module()
class OptimalBiasHook(Hook):
    """Count classification rows on the training data and set the optimal bias of each classifier.

    Before the first iteration the detector of ``model.type='mmdet_lt.SamplingFree'`` sees training
    images with its own assigners and samplers, without gradients; for each head the rows of each
    class that reach ``loss_cls`` with a weight above 0 are counted. Ranks share the images and sum
    their counts. The result goes to the buffers of the detector (so it is in its checkpoints), to
    ``optimal_prior.json`` in the work directory, which ``sampling_free.prior`` accepts, and to a
    cache keyed by data, pipeline and detector. Weights, buffers and random states are as before.

    A classifier that a checkpoint of ``load_from`` brought keeps its bias. On resume nothing is
    measured: data and detector must be those of the checkpoint.

    Rows of RoI heads are proposals of the RPN as it starts, with the ground truth boxes if the
    sampler adds them.

    The parameter of the learned uncertainty (generation 2021) is taken out of weight decay, which
    would pull it to 0 and the weights of the losses with it.

    Args:
        num_images: Images to look at most, evenly spaced over the data set; None for all.
        cache: Reuse and store results below ``cache_dir()/optimal_prior``.

    Raises:
        InputError: No foreground row, counts of other data or of another detector, or no
            classifier.
    """

    def __init__(self, num_images: int | None = 5000, cache: bool = True) -> None:
        if num_images is not None and (type(num_images) is not int or num_images < 1):
            raise InputError(
                '`OptimalBiasHook.num_images` must be None or a whole number of at least 1, found '
                f'{num_images!r}.'
            )
        self.num_images = num_images
        self.cache = cache

    def before_run(self, runner: Runner) -> None:
        """Take the learned uncertainty out of weight decay, before a checkpoint is loaded."""
        if not isinstance(runner.optim_wrapper, (OptimWrapper, OptimWrapperDict)):
            return  # validation and test build no optimiser
        sigma = getattr(_parts(runner)[1].guide, 'log_sigma', None)
        if sigma is not None:
            exempt_from_decay(runner.optim_wrapper, sigma, runner.param_schedulers)

    def before_train(self, runner: Runner) -> None:
        """Measure or fetch counts, store them and set the biases."""
        model, parts = _parts(runner)
        if not parts.options.needs_counts:
            return
        dataset = runner.train_dataloader.dataset
        marks = dict(
            data=data_mark(dataset, runner.cfg.get('train_dataloader')),
            detector=detector_mark(runner.cfg.get('model'), model),
        )
        if runner._resume and parts.prior.measured():
            _compare(parts.prior.marks(), marks, 'the checkpoint', 'resume with the same')
            return
        rows = self._rows(runner, model, marks)
        parts.prior.put(rows, marks)
        priors = {name: parts.prior.prior(name) for name in parts.prior.heads}
        written = model.write_priors(parts.measured_priors())
        if get_dist_info()[0] == 0:
            text = json.dumps(dict(format=FORMAT, marks=marks, rows=rows))
            write_text_atomic(Path(runner.work_dir) / 'optimal_prior.json', text + '\n')
            _report(priors, written)

    def _rows(
        self, runner: Runner, model: nn.Module, marks: Mapping[str, list[int]]
    ) -> dict[str, list[float]]:
        """Counts from the given file, the cache or the data; equal on every rank."""
        named = model.sampling_free.options.prior_file
        path = self._cache_path(runner, marks) if self.cache else None
        shared: list[Any] = [None]
        if get_dist_info()[0] == 0:
            try:
                shared = [_given(named, marks) if named else _cached(path, marks)]
            except InputError as error:
                shared = [error]
        broadcast_object_list(shared, src=0)
        if isinstance(shared[0], InputError):
            raise shared[0]
        if shared[0] is not None:
            return shared[0]
        rows = count_rows(model, runner.train_dataloader, self.num_images)
        if path is not None and get_dist_info()[0] == 0:
            try:
                write_text_atomic(path, json.dumps(dict(format=FORMAT, marks=marks, rows=rows)))
            except OSError:  # a read-only home only costs a second measurement
                pass
        return rows

    def _cache_path(self, runner: Runner, marks: Mapping[str, list[int]]) -> Path:
        loader = runner.train_dataloader
        # All images of a smaller data set are looked at, whatever the limit is.
        images = min(self.num_images or len(loader.dataset), len(loader.dataset))
        started_from = None if runner._resume else weights_mark(runner._load_from)
        name = combined_mark(marks, images, batch_size(loader), started_from)
        return cache_dir() / 'optimal_prior' / f'{name}.json'


def _parts(runner: Runner) -> tuple[nn.Module, nn.Module]:
    """The detector, and the state of Sampling-Free in it."""
    model = bare_model(runner.model)
    parts = getattr(model, 'sampling_free', None)
    if parts is None:
        raise InputError(
            f'OptimalBiasHook works on a model of type mmdet_lt.SamplingFree, found '
            f"{type(model).__name__}: set `model.type='mmdet_lt.SamplingFree'` and "
            f"`model.detector='{type(model).__name__}'`."
        )
    return model, parts


def _compare(found: Mapping, expected: Mapping, where: str, advice: str) -> None:
    """Refuse counts of other data or of another detector."""
    kinds = {'data': 'other training data or another pipeline', 'detector': 'another detector'}
    for key, what in kinds.items():
        if list(found.get(key, ())) != list(expected[key]):
            raise InputError(
                f'the optimal prior of {where} was measured with {what} than this config has: '
                f'{advice}.'
            )


def _is_rows(rows: Any) -> bool:
    """Whether ``rows`` are lists of counts, finite and not negative, by head."""
    return isinstance(rows, dict) and all(
        isinstance(counts, list)
        and all(type(n) in (int, float) and 0 <= n < math.inf for n in counts)
        for counts in rows.values()
    )


def _given(path: str, marks: Mapping[str, list[int]]) -> dict[str, list[float]]:
    content = read_json(path, 'model.sampling_free.prior', 'file of a measured prior')
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        found = content.get('format') if isinstance(content, dict) else type(content).__name__
        raise InputError(
            f'{path} (`model.sampling_free.prior`) is no file of a measured prior: expected format '
            f'{FORMAT}, found {found}.'
        )
    found = content.get('marks')
    if not isinstance(found, dict) or not _is_rows(content.get('rows')):
        raise InputError(
            f'{path} (`model.sampling_free.prior`) is damaged: expected `marks` and for each head '
            'a list of row counts in `rows`: restore it, or set '
            "`model.sampling_free.prior='measure'`."
        )
    _compare(found, marks, path, "set `model.sampling_free.prior='measure'`")
    return content['rows']


def _cached(path: Path | None, marks: Mapping[str, list[int]]) -> dict[str, list[float]] | None:
    """The rows of a cache entry, None if there is none or it is damaged."""
    if path is None or not path.is_file():
        return None
    try:
        return _given(str(path), marks)
    except InputError:
        return None


def _report(priors: Mapping[str, float], written: Mapping[str, str | None]) -> None:
    for name, prior in priors.items():
        print_log(f'optimal prior of {name}: {prior:.4g}', logger='current')
    for name, layout in written.items():
        what = f'set to the {layout} optimum'
        if layout is None:
            what = 'left alone: its columns are neither C sigmoids nor a softmax over C + 1'
        print_log(f'bias of {name} {what}', logger='current')
