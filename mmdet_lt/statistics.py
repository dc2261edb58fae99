"""How often each class occurs: the one source of class counts in the package.

Symbols used everywhere: ``C`` classes with labels ``0 .. C-1``, background label ``C``;
``image_count[c]`` images that contain class ``c`` at least once; ``instance_count[c]`` boxes of
class ``c``. Crowd boxes (``iscrowd``/``ignore_flag``) are never counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_lt.errors import InputError
from mmdet_lt.utils.counting import annotation_pairs, sorted_categories
from mmdet_lt.utils.files import cache_dir, file_digest, read_json, write_text_atomic
from mmdet_lt.utils.names import canonical_name

FORMAT = 'mmdet_lt.class_statistics.v1'
#: LVIS: rare classes occur in at most 10 training images, common ones in at most 100.
DEFAULT_THRESHOLDS = (10, 100)
GROUPS = ('r', 'c', 'f')
GROUP_NAMES = {'r': 'rare', 'c': 'common', 'f': 'frequent'}


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """Class counts of one training set.

    Args:
        classes: Names in label order, length C, unique.
        image_count: Images that contain the class, int64 (C,).
        instance_count: Boxes of the class without crowd boxes, int64 (C,).
        num_images: Images of the data set, with or without annotations.
        num_annotated_images: Images with at least one counted box. This is the denominator of
            :attr:`image_frequency`, as in the tables that LVIS methods use (99,388 for LVIS v1
            train, not 100,170). Defaults to ``num_images``.
        thresholds: ``(a, b)``: rare up to ``a`` images, common up to ``b``, else frequent.
        frequency: One of 'r', 'c', 'f' per class where the annotation file states it (LVIS),
            else '' ; stated groups win over the thresholds.
        source: Where the counts come from, for messages.

    Raises:
        InputError: Lengths disagree, names repeat, counts are negative or impossible.
    """

    classes: tuple[str, ...]
    image_count: np.ndarray
    instance_count: np.ndarray
    num_images: int
    num_annotated_images: int | None = None
    thresholds: tuple[int, int] = DEFAULT_THRESHOLDS
    frequency: tuple[str, ...] = ()
    source: str = field(default='given values', compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, 'classes', tuple(str(name) for name in self.classes))
        for key in ('image_count', 'instance_count'):
            given = np.asarray(getattr(self, key))
            values = given.astype(np.int64)
            if values.ndim != 1 or len(values) != len(self.classes):
                raise InputError(
                    f'`{key}` of the class statistics ({self.source}) must hold one number per '
                    f'class: expected shape ({len(self.classes)},), found {given.shape}.'
                )
            if (values < 0).any() or (values != given).any():
                raise InputError(
                    f'`{key}` of the class statistics ({self.source}) must hold whole numbers of '
                    f'at least 0, found {given[(values < 0) | (values != given)][0]}.'
                )
            values.flags.writeable = False
            put(self, key, values)
        put(self, 'num_images', int(self.num_images))
        annotated = self.num_annotated_images
        put(self, 'num_annotated_images', self.num_images if annotated is None else int(annotated))
        put(self, 'frequency', tuple(self.frequency) or ('',) * self.num_classes)
        low, high = (int(v) for v in self.thresholds)
        put(self, 'thresholds', (low, high))
        self._check(low, high)

    def _check(self, low: int, high: int) -> None:
        if len(set(self.classes)) != len(self.classes):
            twice = next(n for n in self.classes if self.classes.count(n) > 1)
            raise InputError(f'class name {twice!r} occurs twice in {self.source}: rename one.')
        if not self.classes:
            raise InputError(f'{self.source} has no categories: expected at least one class.')
        if not 0 <= low < high:
            raise InputError(
                f'`thresholds` must be (a, b) with 0 <= a < b, found {self.thresholds}.'
            )
        if len(self.frequency) != self.num_classes or not set(self.frequency) <= {'', *GROUPS}:
            raise InputError(
                f"`frequency` of {self.source} must be 'r', 'c' or 'f' for each of the "
                f'{self.num_classes} classes, found {sorted(set(self.frequency))} for '
                f'{len(self.frequency)}.'
            )
        bad = np.flatnonzero(
            (self.image_count > self.instance_count) | (self.image_count > self.num_images)
        )
        if len(bad):
            c = int(bad[0])
            raise InputError(
                f'class {self.classes[c]!r} of {self.source} has image_count '
                f'{self.image_count[c]}, instance_count {self.instance_count[c]} and the set '
                f'{self.num_images} images: image_count cannot be the largest of the three.'
            )

    @property
    def num_classes(self) -> int:
        """C, the number of foreground classes."""
        return len(self.classes)

    @property
    def groups(self) -> np.ndarray:
        """'r', 'c' or 'f' for each class, (C,), from the file where it says so."""
        low, high = self.thresholds
        above_low = np.where(self.image_count <= high, 'c', 'f')
        computed = np.where(self.image_count <= low, 'r', above_low)
        stated = np.asarray(self.frequency, dtype='<U1')
        return np.where(stated == '', computed, stated)

    @property
    def image_frequency(self) -> np.ndarray:
        """``f_c = image_count_c / num_annotated_images``, float64 (C,); 0 for absent classes."""
        return self.image_count / max(self.num_annotated_images, 1)

    def group_index(self, group: str) -> np.ndarray:
        """Labels of one group ('r', 'c' or 'f'), int64."""
        return np.flatnonzero(self.groups == group)

    def align(self, classes: Sequence[str], key: str = 'class_statistics') -> ClassStatistics:
        """The same counts in the label order of ``classes``.

        Raises:
            InputError: A name is not in these statistics: they belong to another data set.
        """
        classes = tuple(classes)
        if classes == self.classes:
            return self
        index = {canonical_name(name): i for i, name in enumerate(self.classes)}
        missing = [name for name in classes if canonical_name(name) not in index]
        if missing:
            raise InputError(
                f'the statistics of {self.source} ({self.num_classes} classes) are of another data '
                f'set: {len(missing)} of the {len(classes)} classes of this one, such as '
                f'{missing[0]!r}, are not in them; correct `{key}`.'
            )
        order = [index[canonical_name(name)] for name in classes]
        return ClassStatistics(
            classes,
            self.image_count[order],
            self.instance_count[order],
            self.num_images,
            self.num_annotated_images,
            self.thresholds,
            tuple(self.frequency[i] for i in order),
            self.source,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassStatistics):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        sizes = ', '.join(f'{(self.groups == g).sum()} {GROUP_NAMES[g]}' for g in GROUPS)
        return f'ClassStatistics({self.num_classes} classes: {sizes}; {self.num_images} images)'

    # ---- storage -------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored by :meth:`save`."""
        return dict(
            format=FORMAT,
            classes=list(self.classes),
            image_count=self.image_count.tolist(),
            instance_count=self.instance_count.tolist(),
            num_images=self.num_images,
            num_annotated_images=self.num_annotated_images,
            thresholds=list(self.thresholds),
            frequency=list(self.frequency),
            groups=self.groups.tolist(),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = 'a dict') -> ClassStatistics:
        """Inverse of :meth:`to_dict`."""
        needed = ('classes', 'image_count', 'instance_count', 'num_images')
        missing = [key for key in needed if key not in values]
        if missing:
            raise InputError(
                f'class statistics in {source} lack {missing}: expected the keys {list(needed)}.'
            )
        optional = ('num_annotated_images', 'thresholds', 'frequency')
        given = {key: values[key] for key in optional if values.get(key) is not None}
        return cls(**{key: values[key] for key in needed}, **given, source=source)

    def save(self, path: str | os.PathLike) -> None:
        """Write the statistics as JSON."""
        write_text_atomic(path, json.dumps(self.to_dict()) + '\n')

    @classmethod
    def load(cls, path: str | os.PathLike) -> ClassStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: The file is missing, truncated or not a statistics file.
        """
        values = read_json(path, 'class_statistics', 'class statistics file')
        if not isinstance(values, dict) or values.get('format') != FORMAT:
            found = values.get('format') if isinstance(values, dict) else type(values).__name__
            raise InputError(
                f'{path} is no class statistics file: expected format {FORMAT}, found {found}.'
            )
        return cls.from_dict(values, str(path))

    # ---- sources -------------------------------------------------------------------------

    @classmethod
    def from_any(
        cls, source: Any, thresholds: tuple[int, int] | None = None, key: str = 'class_statistics'
    ) -> ClassStatistics:
        """Statistics from an instance, a dict, a file (own JSON or annotations) or a data set."""
        if isinstance(source, ClassStatistics):
            stats = source
        elif isinstance(source, Mapping):
            stats = cls.from_dict(source)
        elif isinstance(source, (str, os.PathLike)):
            return cls.from_file(source, thresholds, key=key)
        elif hasattr(source, '__getitem__') and hasattr(source, '__len__'):
            return cls.from_dataset(source, thresholds)
        else:
            raise InputError(
                f'`{key}` must be a file, a dict, a ClassStatistics or a data set, found '
                f'{type(source).__name__}.'
            )
        return stats if thresholds is None else stats.with_thresholds(thresholds)

    def with_thresholds(self, thresholds: tuple[int, int]) -> ClassStatistics:
        """The same counts grouped by other thresholds (groups stated by the file stay)."""
        return ClassStatistics.from_dict(dict(self.to_dict(), thresholds=thresholds), self.source)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike,
        thresholds: tuple[int, int] | None = None,
        cache: bool = True,
        key: str = 'class_statistics',
    ) -> ClassStatistics:
        """Statistics from an LVIS or COCO annotation file, or from a file of :meth:`save`.

        Classes are ordered by ascending category id, whatever their order in the file. Results
        for annotation files are cached in ``cache_dir()/statistics`` under the content's digest.
        """
        path = Path(path)
        if not path.is_file():
            read_json(path, key)  # raises the sentence for a missing file
        stored = cache_dir() / 'statistics' / f'{file_digest(path)}.json' if cache else None
        if stored is not None and stored.is_file():
            try:
                stats = cls.from_dict(cls.load(stored).to_dict(), str(path))
                return stats if thresholds is None else stats.with_thresholds(thresholds)
            except InputError:
                stored.unlink(missing_ok=True)  # damaged cache entry: compute again
        values = read_json(path, key)
        if isinstance(values, dict) and values.get('format') == FORMAT:
            stats = cls.from_dict(values, str(path))
        else:
            stats = cls.from_annotations(values, str(path))
            if stored is not None:
                try:
                    stats.save(stored)
                except OSError:  # a read-only home only costs the second parse
                    pass
        return stats if thresholds is None else stats.with_thresholds(thresholds)

    @classmethod
    def from_annotations(
        cls,
        data: Mapping[str, Any],
        source: str = 'annotations',
        thresholds: tuple[int, int] = DEFAULT_THRESHOLDS,
    ) -> ClassStatistics:
        """Statistics of parsed LVIS or COCO annotations, in one pass over ``data``.

        Raises:
            InputError: A section is missing, or an annotation names an unknown image or category.
        """
        categories = sorted_categories(data, source)
        label_of = {category['id']: i for i, category in enumerate(categories)}
        rows, num_images = annotation_pairs(data, label_of, source)
        stated = tuple(category.get('frequency', '') or '' for category in categories)
        return cls._from_pairs(
            rows[:, 0],
            rows[:, 1],
            tuple(category['name'] for category in categories),
            num_images,
            thresholds,
            stated,
            source,
        )

    @classmethod
    def _from_pairs(
        cls,
        images: np.ndarray,
        labels: np.ndarray,
        classes: tuple[str, ...],
        num_images: int,
        thresholds: tuple[int, int],
        frequency: tuple[str, ...],
        source: str,
    ) -> ClassStatistics:
        """Count (image index, label) pairs, one per box."""
        num_classes = len(classes)
        distinct = np.unique(images * num_classes + labels)
        return cls(
            classes,
            np.bincount(distinct % max(num_classes, 1), minlength=num_classes),
            np.bincount(labels, minlength=num_classes),
            num_images,
            len(np.unique(distinct // max(num_classes, 1))),
            thresholds,
            frequency,
            source,
        )

    @classmethod
    def from_dataset(
        cls, dataset: Any, thresholds: tuple[int, int] | None = None
    ) -> ClassStatistics:
        """Statistics of a built mmdet data set, looking through any wrapper.

        Repeating wrappers (``RepeatDataset``, ``ClassBalancedDataset``) do not change the counts:
        they describe the data, not the sampling. Concatenated sets are counted together; their
        classes must agree.
        """
        from mmdet_lt.datasets.records import dataset_labels, unwrap_datasets

        leaves = unwrap_datasets(dataset)
        classes = leaves[0].metainfo.get('classes')
        if not classes:
            raise InputError(
                f'{type(leaves[0]).__name__} has no class names: set `metainfo=dict(classes=...)`.'
            )
        classes = (classes,) if isinstance(classes, str) else tuple(classes)
        frequency: tuple[str, ...] = ()
        images, labels, offset = [], [], 0
        for leaf in leaves:
            other = tuple(leaf.metainfo.get('classes', ()))
            if other != classes:
                raise InputError(
                    f'the concatenated data sets have different classes: {len(classes)} in the '
                    f'first, {len(other)} in another; give all the same `metainfo.classes`.'
                )
            stated = getattr(leaf, 'class_statistics', None)
            if isinstance(stated, ClassStatistics) and stated.classes == classes:
                frequency = stated.frequency
            index, label = dataset_labels(leaf)
            if len(label) and (label.min() < 0 or label.max() >= len(classes)):
                raise InputError(
                    f'{getattr(leaf, "ann_file", type(leaf).__name__)} yields label {label.max()} '
                    f'but `metainfo.classes` has {len(classes)} names: name all its classes.'
                )
            images.append(index + offset)
            labels.append(label)
            offset += len(leaf)
        source = str(getattr(leaves[0], 'ann_file', '') or type(leaves[0]).__name__)
        return cls._from_pairs(
            np.concatenate(images),
            np.concatenate(labels),
            classes,
            offset,
            thresholds or DEFAULT_THRESHOLDS,
            frequency,
            source,
        )
