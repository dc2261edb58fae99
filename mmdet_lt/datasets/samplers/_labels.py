"""What a sampler needs to know of a data set: which classes occur in which image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from mmdet_lt.datasets.records import indexed_labels, unwrap_datasets
from mmdet_lt.errors import InputError
from mmdet_lt.statistics import ClassStatistics


@dataclass(frozen=True)
class ImageClasses:
    """Distinct (image, class) pairs of a data set and their counts. Crowd boxes are left out.

    Args:
        image: Image of each pair, int64 (P,), ascending.
        label: Class of each pair, int64 (P,).
        boxes: Boxes of each pair, int64 (P,).
        num_images: Images of the data set, with or without boxes.
        num_classes: C.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    num_images: int
    num_classes: int

    @classmethod
    def of(cls, dataset: Any) -> ImageClasses:
        """Read a built data set once, wrapped or not."""
        index, label = indexed_labels(dataset)
        names = unwrap_datasets(dataset)[0].metainfo.get('classes', ())
        named = 1 if isinstance(names, str) else len(names)
        num_classes = max(named, int(label.max(initial=-1)) + 1)
        pairs, boxes = np.unique(index * num_classes + label, return_counts=True)
        image, label = np.divmod(pairs, max(num_classes, 1))
        return cls(image, label, boxes, len(dataset), num_classes)

    @property
    def image_count(self) -> np.ndarray:
        """Images that contain each class, int64 (C,)."""
        return np.bincount(self.label, minlength=self.num_classes)

    @property
    def instance_count(self) -> np.ndarray:
        """Boxes of each class, int64 (C,)."""
        return np.bincount(self.label, self.boxes, self.num_classes).astype(np.int64)

    def digest(self) -> str:
        """Short digest of which classes are in which images."""
        digest = hashlib.blake2b(digest_size=8)
        for column in (self.image, self.label):
            digest.update(np.ascontiguousarray(column, dtype='<i8').tobytes())
        return digest.hexdigest()

    @property
    def annotated(self) -> np.ndarray:
        """Whether an image has a box, bool (num_images,)."""
        return np.bincount(self.image, minlength=self.num_images) > 0


def check_dataset(dataset: Any, name: str) -> None:
    """Refuse what no re-balancing sampler can work on.

    Raises:
        InputError: The data set is empty, or something below the sampler re-balances already.
    """
    for part in _layers(dataset):
        marked = getattr(part, 'repeat_indices', None) is not None
        if marked or getattr(part, 'rebalances', False) or isinstance(part, Sampler):
            raise InputError(
                f'{name} on top of {type(part).__name__} would re-balance twice: expected a data '
                'set that draws each image once, so put the inner data set into '
                '`train_dataloader.dataset`, or use `sampler=dict(type="DefaultSampler")`.'
            )
    if len(dataset) == 0:
        raise InputError(
            f'{name} got an empty data set: check `ann_file`, `data_prefix` and `filter_cfg` of '
            '`train_dataloader.dataset`.'
        )


def _layers(dataset: Any) -> Iterator[Any]:
    """A data set and all that it wraps."""
    yield dataset
    inside = vars(dataset) if hasattr(dataset, '__dict__') else {}
    parts = [inside.get('dataset'), inside.get('_dataset'), *(inside.get('datasets') or ())]
    for part in parts:
        if hasattr(part, '__getitem__') and not isinstance(part, dict):
            yield from _layers(part)


def given_statistics(source: Any, dataset: Any, found: ImageClasses) -> ClassStatistics:
    """Statistics of the config in the label order of a data set.

    Raises:
        InputError: They are of another data set: names differ, a class of the data set has no
            image in them, or fewer than the data set although that is the smaller one.
    """
    key = 'train_dataloader.sampler.class_statistics'
    names = unwrap_datasets(dataset)[0].metainfo.get('classes', ())
    names = (names,) if isinstance(names, str) else tuple(names)
    stats = ClassStatistics.from_any(source, key=key).align(names, key)
    count = found.image_count
    # A wrapper that repeats images makes them more than the file has; then only absence tells.
    least = count if found.num_images <= stats.num_images else np.minimum(count, 1)
    wrong = np.flatnonzero(stats.image_count < least)
    if len(wrong):
        c = int(wrong[0])
        raise InputError(
            f'the statistics of {stats.source} are of another data set: they state '
            f'{stats.image_count[c]} images with {names[c]!r}, the training set has {count[c]}; '
            f'correct `{key}`.'
        )
    return stats
