"""Common ground of the re-balancing samplers: validation, ranks, epochs, skipping, deferral, state.

Symbols: ``n`` images of the data set, ``W`` ranks, ``L`` images that all ranks together draw in one
epoch (:attr:`RebalancingSampler.epoch_size`), ``N = ceil(L / W)`` of them on each rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from mmdet_lt.datasets.samplers._draws import draw_list
from mmdet_lt.datasets.samplers._labels import ImageClasses, check_dataset
from mmdet_lt.errors import InputError

_FORMAT = 'mmdet_lt.sampler.v1'


class RebalancingSampler(Sampler):
    r"""A sampler whose stream is a pure function of seed, epoch and position.

    Every rank computes the list of an epoch, :meth:`epoch_indices`, and takes each ``W``-th entry
    of it, so the union over ranks does not depend on ``W`` (only the last, incomplete round of an
    epoch is filled up from the start of its list). All epochs have the length ``N``.

    - Epoch loops call :meth:`set_epoch` and iterate once for each epoch.
    - Iteration loops iterate again and again; MMEngine's endless iterator calls :meth:`set_epoch`
      in between.
    - :meth:`skip` moves on without drawing; ``mmdet_lt.IterBasedTrainLoop`` uses it on resume.
    - :meth:`defer_until` draws plainly first and re-balanced later.

    Subclasses implement :meth:`_expected_draws`, or :meth:`_draw` and :meth:`_shares`, and call
    :meth:`_set_length` last in their constructor.

    Args:
        dataset: Built data set, wrapped or not.
        seed: Same on every rank; by default drawn once and shared.
        shuffle: Random order, else data set order.

    Raises:
        InputError: The data set is empty or has no box, something below it re-balances already, or
            the seed is negative.
    """

    def __init__(self, dataset: Sized, seed: int | None = None, shuffle: bool = True) -> None:
        check_dataset(dataset, type(self).__name__)
        if seed is not None and (not isinstance(seed, (int, np.integer)) or seed < 0):
            raise InputError(
                f'`train_dataloader.sampler.seed` must be a whole number of at least 0, or None '
                f'for a drawn one, found {seed!r}.'
            )
        self.rank, self.world_size = get_dist_info()
        self.dataset = dataset
        self.seed = int(sync_random_seed() if seed is None else seed)
        self.shuffle = shuffle
        self.contents = ImageClasses.of(dataset)
        if not len(self.contents.image):
            raise InputError(
                f'{type(self).__name__} found no box in the {len(dataset)} images of the data set '
                '(crowd boxes do not count), so every image has factor 0: check `ann_file` and '
                '`metainfo.classes` of `train_dataloader.dataset`.'
            )
        self.epoch = 0
        self._passed_epochs = 0
        self._start = 0
        self._deferral: tuple[str, int] | None = None
        # The settings of the stream are numbered, so that a running iteration can tell a change.
        self._revision = 0
        self._iterated: int | None = None

    def _set_length(self, expected_draws: float) -> None:
        """Fix the length of an epoch, ``L`` being the draws rounded up."""
        self.epoch_size = math.ceil(expected_draws)
        self.num_samples = math.ceil(self.epoch_size / self.world_size)
        self.total_size = self.num_samples * self.world_size

    # ---- what a method decides ---------------------------------------------------------------

    def _expected_draws(self, epoch: int) -> np.ndarray:
        """Expected draws of each image in one re-balanced epoch, float64 (n,)."""
        raise NotImplementedError

    def _shares(self, epoch: int) -> np.ndarray:
        """Expected share of each image in a re-balanced epoch, float64 (n,), sum 1."""
        expected = self._expected_draws(epoch)
        return expected / expected.sum()

    def _draw(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """The re-balanced list of one epoch, int64 (about ``L``,)."""
        return draw_list(self._expected_draws(epoch), rng, self.shuffle)

    def parameters(self) -> dict[str, Any]:
        """The arguments that decide the stream, next to data set and seed, as plain values."""
        return dict(shuffle=self.shuffle)

    # ---- the stream --------------------------------------------------------------------------

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """The list all ranks share in one epoch, int64 (``N * W``,)."""
        plain = self._plain_samples(epoch) * self.world_size
        if plain == self.total_size:
            return self._plain(epoch)
        rng = np.random.default_rng([self.seed, epoch])
        # At most `world_size` entries are missing to a full list; they come from its start.
        balanced = np.resize(self._draw(epoch, rng), self.total_size)
        if plain:
            balanced[:plain] = self._plain(epoch)[:plain]
        return balanced

    def _plain(self, epoch: int) -> np.ndarray:
        """An epoch without re-balancing: a piece of endless passes over all images, (N * W,).

        Where epochs are longer than the data set, the passes run on across their borders, so every
        image is drawn once per ``n`` draws.
        """
        number = len(self.dataset)
        first, last = epoch * self.epoch_size, (epoch + 1) * self.epoch_size
        passes = []
        for turn in range(first // number, (last - 1) // number + 1):
            order = np.arange(number)
            if self.shuffle:
                order = np.random.default_rng([self.seed, turn, 1]).permutation(number)
            begin = turn * number
            passes.append(order[max(first - begin, 0) : last - begin])
        return np.resize(np.concatenate(passes), self.total_size)

    def image_probabilities(self, epoch: int = 0) -> np.ndarray:
        """Expected share of each image among the draws of one epoch, float64 (n,), sum 1.

        Deferral is taken into account. The at most ``W - 1`` draws that fill up the last round of
        an epoch are not.
        """
        plain = self._plain_samples(epoch) / self.num_samples
        uniform = np.full(len(self.dataset), 1 / len(self.dataset))
        if plain == 1:
            return uniform
        return plain * uniform + (1 - plain) * self._shares(epoch)

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        self._iterated = self._revision
        indices = self.epoch_indices(self.epoch + self._passed_epochs)
        own = indices[self.rank :: self.world_size][start:]
        return self._stream(own.tolist(), self._revision)

    def _stream(self, indices: list[int], revision: int) -> Iterator[int]:
        for index in indices:
            if revision != self._revision:
                raise InputError(
                    f'{type(self).__name__} was changed (switch epoch or restored seed) while the '
                    'data loader had begun to draw: use '
                    "`train_cfg.type='mmdet_lt.IterBasedTrainLoop'`, which starts the loader anew."
                )
            yield index

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from where :meth:`skip` moved to."""
        self.epoch = epoch

    def skip(self, num_samples: int) -> None:
        """Let the next iteration start further on, across epochs, without drawing what is between.

        Epochs that lie in between count as passed: an endless iterator that starts to count its
        epochs from 0 goes on after them.

        Args:
            num_samples: Samples of this rank.
        """
        if num_samples < 0:
            raise InputError(
                f'skip() takes a number of samples of at least 0, found {num_samples}.'
            )
        passed, self._start = divmod(self._start + num_samples, self.num_samples)
        self._passed_epochs += passed

    @property
    def stale(self) -> bool:
        """Whether the stream was changed after the last iteration over it had begun."""
        return self._iterated is not None and self._iterated != self._revision

    # ---- deferral ----------------------------------------------------------------------------

    def defer_until(self, epoch: int | None = None, num_samples: int | None = None) -> None:
        """Draw plainly up to an epoch or a position, re-balanced from there on.

        The plain part draws every image once per pass, in random order if ``shuffle``; epochs keep
        their length. The sampler compares positions itself, so batches that workers load ahead
        change nothing; call this before the data loader is iterated. Position ``p`` of this rank
        after the switch is the same image as without deferral.

        Args:
            epoch: First re-balanced epoch.
            num_samples: First re-balanced position in the stream of this rank. The position of an
                iteration is :func:`mmdet_lt.engine.loops.positions.samples_before`.

        Raises:
            InputError: None or both are given, or a negative number.
        """
        given = [
            (k, v) for k, v in (('epoch', epoch), ('num_samples', num_samples)) if v is not None
        ]
        if len(given) != 1 or int(given[0][1]) != given[0][1] or given[0][1] < 0:
            raise InputError(
                'defer_until() takes either `epoch` or `num_samples`, a whole number of at least '
                f'0, found epoch={epoch}, num_samples={num_samples}.'
            )
        deferral = (given[0][0], int(given[0][1]))
        if deferral != self._deferral:
            self._deferral = deferral
            self._revision += 1

    @property
    def switch_sample(self) -> int:
        """First re-balanced position in the stream of this rank; 0 without deferral."""
        if self._deferral is None:
            return 0
        unit, value = self._deferral
        return value * self.num_samples if unit == 'epoch' else value

    def _plain_samples(self, epoch: int) -> int:
        """Samples of this rank at the start of an epoch that are drawn plainly."""
        return min(max(self.switch_sample - epoch * self.num_samples, 0), self.num_samples)

    # ---- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Seed, kind, parameters, data set (lengths, digest) and deferral as plain values.

        Epoch and position are not part of it: the training loop knows them.
        """
        return dict(
            format=_FORMAT,
            type=type(self).__name__,
            parameters=self.parameters(),
            num_images=len(self.dataset),
            epoch_size=self.epoch_size,
            labels=self.contents.digest(),
            seed=self.seed,
            deferral=None if self._deferral is None else list(self._deferral),
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over seed and deferral of an earlier run.

        Raises:
            InputError: The earlier sampler was of another type, had other parameters, another data
                set or another switch.
        """
        here = self.state_dict()
        for key, name in _COMPARED.items():
            if state.get(key) != here[key]:
                raise _differs(type(self).__name__, name, *_pick(state.get(key), here[key]))
        deferral = None if state.get('deferral') is None else tuple(state['deferral'])
        if self._deferral is not None and deferral != self._deferral:
            raise _differs(type(self).__name__, 'switch', deferral, self._deferral)
        if (state['seed'], deferral) != (self.seed, self._deferral):
            self.seed, self._deferral = int(state['seed']), deferral
            self._revision += 1


_COMPARED = {
    'format': 'format',
    'type': 'type',
    'parameters': 'parameters',
    'num_images': 'number of images',
    'epoch_size': 'epoch length',
    'labels': 'digest of the labels',
}


def _pick(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two dicts only what differs."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old, new
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return tuple({k: d[k] for k in keys if k in d} for d in (old, new))


def _differs(kind: str, what: str, old: Any, new: Any) -> InputError:
    return InputError(
        f'the checkpoint was trained with another sampler than {kind} of '
        f'`train_dataloader.sampler` ({what} was {old} and is now {new}): resume with the same '
        'sampler and data set, or start a new run with `load_from`.'
    )
