"""Iteration loop that moves the sampler on resume, where MMEngine's loads all data again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner import loops as mmengine_loops
from torch.utils.data import BatchSampler, DataLoader
from tqdm import tqdm

from mmdet_lt.engine.loops.positions import loader_sampler, samples_before
from mmdet_lt.registry import LOOPS


@LOOPS.register_module()
class IterBasedTrainLoop(mmengine_loops.IterBasedTrainLoop):
    """MMEngine's iteration loop with a cheap resume; takes the same arguments.

    MMEngine's loop replays all iterations that were trained already, loading and augmenting their
    images. This one calls ``skip()`` of the sampler and starts the data loader anew, so the images
    that follow are those of the uninterrupted run, at once. Samplers without ``skip()`` are
    replayed, with a warning. It also starts the loader anew when a hook changed the sampler
    (deferral, restored seed) after workers had begun to load.

    Write ``train_cfg = dict(type='mmdet_lt.IterBasedTrainLoop', ...)``: the plain name stays
    MMEngine's.

    The order of the images is that of an uninterrupted run; the random numbers inside augmentations
    are not, as in MMEngine.
    """

    def run(self) -> Any:
        """Train."""
        # The parent loop first throws away `self._iter` batches: MMEngine's asks for each of them,
        # that of the onedl fork calls `skip_iter`.
        self.dataloader_iterator = _ForwardedIterator(
            self.dataloader, self.dataloader_iterator, self._iter
        )
        return super().run()


class _ForwardedIterator:
    """Endless batches whose first ``done`` are placeholders, None, at no cost.

    Moving waits for the first batch that is wanted: by then all hooks have had their say.
    """

    def __init__(self, loader: DataLoader, begun: Iterator, done: int) -> None:
        self._loader, self._begun, self._done = loader, begun, done
        self._placeholders = done
        self._batches: Iterator | None = None

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        if self._placeholders:
            self._placeholders -= 1
            return None
        if self._batches is None:
            self._batches = self._moved()
            self._begun = None
        return next(self._batches)

    def skip_iter(self, num_iters: int) -> None:
        """Throw away placeholders, for the onedl fork."""
        self._placeholders -= num_iters

    def _moved(self) -> Iterator:
        sampler = loader_sampler(self._loader)
        if self._done and not hasattr(sampler, 'skip'):
            _replay(self._begun, self._done, type(sampler).__name__)
            return self._begun
        if self._done:
            _skip(self._loader, self._done)
        elif not getattr(sampler, 'stale', False):
            return self._begun
        self._begun = None  # workers that are not persistent end before new ones start
        _empty_buckets(self._loader.batch_sampler)
        return mmengine_loops._InfiniteDataloaderIterator(self._loader)


def _replay(batches: Iterator, number: int, name: str) -> None:
    print_log(
        f'{name} has no skip(): {number} batches are loaded again to get to where training '
        'stopped. The samplers of mmdet_lt skip them.',
        logger='current',
        level=logging.WARNING,
    )
    for _ in tqdm(range(number), desc='replaying data', disable=not is_main_process()):
        next(batches)


def _skip(loader: DataLoader, iterations: int) -> None:
    sampler, batches = loader_sampler(loader), loader.batch_sampler
    if batches is None or type(batches) is BatchSampler:
        sampler.skip(samples_before(loader, iterations))
        return
    # Which samples a grouping batch sampler took for its batches is only known after going through
    # their indices; nothing is loaded for that, and whole epochs need no look.
    epochs, rest = divmod(iterations, len(loader))
    sampler.skip(epochs * len(sampler))
    # The loader refuses another batch sampler by assignment, but nothing has been read from it yet.
    vars(loader)['batch_sampler'] = _LaterBatches(batches, rest)
    loader._iterator = None  # persistent workers would keep the old one


def _empty_buckets(batches: Any) -> None:
    """Forget what MMDetection's aspect ratio samplers collected in an iteration given up."""
    for bucket in getattr(batches, '_aspect_ratio_buckets', ()):
        bucket.clear()


class _LaterBatches:
    """A batch sampler without its first batches, in the first iteration only."""

    def __init__(self, batches: Any, leave_out: int) -> None:
        self._batches, self._leave_out = batches, leave_out

    def __iter__(self) -> Iterator[list[int]]:
        left, self._leave_out = self._leave_out, 0
        for number, batch in enumerate(self._batches):
            if number >= left:
                yield batch

    def __len__(self) -> int:
        return len(self._batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)
