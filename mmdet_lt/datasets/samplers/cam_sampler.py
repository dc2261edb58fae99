r"""CAM-based sampling: draw rare classes more often, and paste their foregrounds.

Paper: Zhang, Wei, Zhou, Wu, *Bag of Tricks for Long-Tailed Visual Recognition with Deep
Convolutional Neural Networks*, AAAI 2021.

.. math::
    p_c = \frac{n_c^q}{\sum_k n_k^q}, \qquad
    p_c(t) = \Big(1 - \frac{t}{T}\Big) \frac{n_c}{\sum_k n_k} + \frac{t}{T} \frac{1}{C'}

``n_c`` objects of class ``c`` can be pasted, ``C'`` classes have one; ``q = 0`` for
``class_balanced``, ``1/2`` for ``square_root``, the right form for ``progressive``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from mmengine.logging import print_log

from mmdet_lt.datasets._paste_bank import PasteBank
from mmdet_lt.datasets.paste_request import PasteIndex
from mmdet_lt.datasets.samplers.base import RebalancingSampler
from mmdet_lt.datasets.transforms.cam_paste import CAMPaste
from mmdet_lt.errors import InputError
from mmdet_lt.registry import DATA_SAMPLERS

_EXPONENTS = {'class_balanced': 0.0, 'square_root': 0.5}
DISTRIBUTIONS = (*_EXPONENTS, 'progressive')
_KEY = 'train_dataloader.sampler'


@DATA_SAMPLERS.register_module()
class CAMSampler(RebalancingSampler):
    """Draw images, and for a share of them an object that :class:`mmdet_lt.CAMPaste` pastes.

    For each image a coin with probability ``prob`` decides whether something is pasted; then a
    class is drawn by ``distribution`` and one of its objects uniformly. The index carries the
    request, so the stream of pasted objects is a pure function of seed, epoch and position, for any
    number of workers and ranks, and before the switch of :meth:`defer_until` nothing is pasted.

    - The form for detection: images come from ``background``, the object goes into any of them.
    - The paper's form, ``same_image=True``: the image is the drawn object's own, and its foreground
      is shown transformed on the background it came from. With ``background`` class-balanced, too,
      and ``CAMPaste(one_of=True)`` this is what the paper trains on in its second stage.

    An epoch is as long as that of ``background``.

    Args:
        dataset: Built data set with CAMPaste in its pipeline. MultiImageMixDataset may wrap it.
        distribution: 'class_balanced', 'square_root' or 'progressive'.
        prob: Share of the images that get an object.
        mask_source: What is cut: 'cam' (foreground by CAM), 'mask' (annotated segmentation) or
            'box' (the whole box). The last two are the paper's ablation "ImageTrans".
        cams: File of ``tools/cam/extract_cams.py``, for 'cam'.
        checkpoint: Checkpoint the CAMs must come from, as a file or its digest; None accepts any.
        same_image: See above.
        background: Config of a sampler of this package that draws the images; None draws each
            image once an epoch.
        max_epochs: ``T`` of 'progressive' for epoch loops: `train_cfg.max_epochs`.
        max_samples: ``T`` of 'progressive' for iteration loops: iterations x batch size x ranks.
        seed: Same on every rank; by default drawn once and shared.
        shuffle: Random order of the images, else data set order.

    Raises:
        InputError: CAMs are missing or of another annotation file, checkpoint or class list; no
            object can be pasted; CAMPaste is missing from the pipeline or at the wrong place; the
            data set is concatenated or repeated; an argument is out of range.
    """

    def __init__(
        self,
        dataset: Sized,
        distribution: str = 'class_balanced',
        prob: float = 0.5,
        mask_source: str = 'cam',
        cams: str | None = None,
        checkpoint: str | None = None,
        same_image: bool = False,
        background: dict[str, Any] | None = None,
        max_epochs: int | None = None,
        max_samples: int | None = None,
        seed: int | None = None,
        shuffle: bool = True,
    ) -> None:
        _check_arguments(distribution, prob, max_epochs, max_samples)
        super().__init__(dataset, seed, shuffle)
        self.distribution, self.prob, self.same_image = distribution, prob, same_image
        self.max_epochs, self.max_samples = max_epochs, max_samples
        leaf = bind_paste(dataset)
        self.bank = PasteBank(
            leaf, mask_source, cams, checkpoint, len(dataset) if same_image else None
        )
        self.background = self._build_background(background)
        self._set_length(len(dataset) if background is None else self.background.epoch_size)
        print_log(
            f'CAMSampler: {len(self.bank.image)} objects of {np.count_nonzero(self.bank.counts)} '
            f'classes can be pasted, into {prob:.0%} of the images.',
            logger='current',
        )

    def _build_background(self, config: dict[str, Any] | None) -> RebalancingSampler | None:
        if config is None:
            return None
        sampler = DATA_SAMPLERS.build(
            config, default_args=dict(dataset=self.dataset, seed=self.seed, shuffle=self.shuffle)
        )
        if not isinstance(sampler, RebalancingSampler) or isinstance(sampler, CAMSampler):
            raise InputError(
                f'`{_KEY}.background` must be another re-balancing sampler of mmdet_lt, such as '
                f'mmdet_lt.ClassBalancedSampler, found {type(sampler).__name__}; leave it out to '
                'draw each image once an epoch.'
            )
        return sampler

    # ---- the draw --------------------------------------------------------------------------

    def class_probabilities(self, progress: float = 0.0) -> np.ndarray:
        """Probability of each class when an object is drawn, float64 (C,).

        Args:
            progress: ``t / T``, for 'progressive' only.
        """
        counts = self.bank.counts
        if self.distribution == 'progressive':
            balanced = (counts > 0) / np.count_nonzero(counts)
            return (1 - progress) * counts / counts.sum() + progress * balanced
        weight = np.maximum(counts, 1.0) ** _EXPONENTS[self.distribution] * (counts > 0)
        return weight / weight.sum()

    def progress(self, epoch: int) -> np.ndarray:
        """``t / T`` of each draw of an epoch, float64 (epoch_size,), at most 1; 0 if not used."""
        if self.max_epochs is not None:
            done = np.full(self.epoch_size, (epoch + 1) / self.max_epochs)
        elif self.max_samples is not None:
            done = (epoch * self.epoch_size + np.arange(1, self.epoch_size + 1)) / self.max_samples
        else:
            done = np.zeros(self.epoch_size)
        return np.minimum(done, 1.0)

    def _pastes(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each draw of an epoch: row of the object in the bank (-1: none), and a seed."""
        size = self.epoch_size
        rng = np.random.default_rng([self.seed, epoch, 2])
        pasted = rng.random(size) < self.prob
        # Progressive: a coin decides between the two ends, which makes the mixture exact.
        late = rng.random(size) < self.progress(epoch)
        uniform = rng.random(size)
        labels = np.where(
            late,
            _pick(self.class_probabilities(1.0), uniform),
            _pick(self.class_probabilities(0.0), uniform),
        )
        rows = self.bank.rows(labels, rng.random(size))
        return np.where(pasted, rows, -1), rng.integers(2**32, size=size)

    def paste_rows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Like :meth:`epoch_indices`: rows and seeds of all ranks, deferral included, (N * W,)."""
        rows, seeds = (np.resize(values, self.total_size) for values in self._pastes(epoch))
        rows[: self._plain_samples(epoch) * self.world_size] = -1
        return rows, seeds

    def _draw(self, epoch: int, rng: np.random.Generator) -> np.ndarray:
        if self.background is None:
            images = self._plain(epoch)[: self.epoch_size]
        else:
            images = np.resize(self.background._draw(epoch, rng), self.epoch_size)
        if self.same_image:
            rows, _ = self._pastes(epoch)
            images = np.where(rows >= 0, self.bank.image[rows], images)
        return images

    def _shares(self, epoch: int) -> np.ndarray:
        number = len(self.dataset)
        shares = np.full(number, 1 / number)
        if self.background is not None:
            shares = self.background._shares(epoch)
        if not self.same_image:
            return shares
        classes = self.class_probabilities(float(self.progress(epoch).mean()))
        each = classes / np.maximum(self.bank.counts, 1)
        own = np.bincount(self.bank.image, each[self.bank.label], number)
        return (1 - self.prob) * shares + self.prob * own

    def __iter__(self) -> Iterator[int]:
        rows, seeds = self.paste_rows(self.epoch + self._passed_epochs)
        own = slice(self.rank + self._start * self.world_size, None, self.world_size)
        pastes = zip(rows[own].tolist(), seeds[own].tolist(), strict=True)
        return self._with_requests(super().__iter__(), pastes)

    def _with_requests(
        self, indices: Iterator[int], pastes: Iterator[tuple[int, int]]
    ) -> Iterator[int]:
        for index, (row, seed) in zip(indices, pastes, strict=True):
            yield PasteIndex(index, None if row < 0 else self.bank.request(row, seed))

    def parameters(self) -> dict[str, Any]:
        """The arguments that decide the stream."""
        background = self.background
        return dict(
            super().parameters(),
            distribution=self.distribution,
            prob=self.prob,
            mask_source=self.bank.mask_source,
            pasteable=int(self.bank.counts.sum()),
            same_image=self.same_image,
            background=background and [type(background).__name__, background.parameters()],
            max_epochs=self.max_epochs,
            max_samples=self.max_samples,
        )


def _pick(probabilities: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Classes drawn by inversion, int64; never one of probability 0."""
    present = np.flatnonzero(probabilities)
    edges = np.cumsum(probabilities[present])
    found = np.searchsorted(edges, uniform * edges[-1], side='right')
    return present[np.minimum(found, len(present) - 1)]


def bind_paste(dataset: Any) -> Any:
    """Check the pipeline of a data set, lend its loader to CAMPaste, and return the inner set.

    Raises:
        InputError: CAMPaste is missing or at the wrong place, or a wrapper changes indices.
    """
    leaf = dataset
    while (inner := _inner(leaf)) is not None:
        leaf = inner
    steps = list(getattr(getattr(leaf, 'pipeline', None), 'transforms', ()))
    places = [k for k, step in enumerate(steps) if isinstance(step, CAMPaste)]
    names = [type(step).__name__ for step in steps]
    if len(places) != 1:
        raise InputError(
            'CAMSampler needs one mmdet_lt.CAMPaste in `train_dataloader.dataset.pipeline`, found '
            f'{len(places)} in {names}: put it after LoadAnnotations.'
        )
    before = steps[: places[0]]
    loaders = [step for step in before if type(step).__name__.startswith('LoadImage')]
    annotations = [step for step in before if getattr(step, 'with_bbox', False)]
    alien = [n for n in names[: places[0]] if not n.startswith('Load')]
    if alien or len(loaders) != 1 or not annotations:
        raise InputError(
            'CAMPaste must come directly after one image loader and LoadAnnotations with boxes, '
            f'found {names[: places[0]]} before it: move it in `train_dataloader.dataset.pipeline`.'
        )
    if any(getattr(step, 'with_seg', False) for step in annotations):
        raise InputError(
            'CAMPaste cannot update semantic maps: set `with_seg=False` of LoadAnnotations in '
            '`train_dataloader.dataset.pipeline`.'
        )
    steps[places[0]].bind(loaders[0])
    return leaf


def _inner(dataset: Any) -> Any:
    """What a wrapper that passes indices on as they are wraps, or None for a plain data set."""
    inside = vars(dataset)
    inner = inside.get('_dataset') or inside.get('dataset')  # `_dataset`: MMEngine's slice
    changes = hasattr(dataset, 'times') or inside.get('datasets') is not None
    if changes:
        raise InputError(
            f'{type(dataset).__name__} changes indices, so CAMSampler cannot tell an image what to '
            'paste: put one plain data set into `train_dataloader.dataset` (join annotation files '
            'of concatenated sets, lengthen the schedule of repeated ones).'
        )
    return inner if hasattr(inner, '__getitem__') and not isinstance(inner, dict) else None


def _check_arguments(
    distribution: str, prob: float, max_epochs: int | None, max_samples: int | None
) -> None:
    if distribution not in DISTRIBUTIONS:
        raise InputError(
            f'`{_KEY}.distribution` must be one of {list(DISTRIBUTIONS)}, found {distribution!r}.'
        )
    if not 0 < prob <= 1:
        raise InputError(f'`{_KEY}.prob` must be a probability in (0, 1], found {prob}.')
    given = [value for value in (max_epochs, max_samples) if value is not None]
    wanted = int(distribution == 'progressive')
    if len(given) != wanted or (wanted and given[0] <= 0):
        raise InputError(
            f'`{_KEY}` takes one positive number, `max_epochs` or `max_samples`, with '
            f"distribution='progressive' and none otherwise, found distribution={distribution!r}, "
            f'max_epochs={max_epochs}, max_samples={max_samples}.'
        )
