"""A flat table of the objects of a data set, with the annotation id of each."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdet_lt.cam.masks import is_segmentation
from mmdet_lt.datasets.records import _all_records
from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import read_json
from mmdet_lt.utils.names import canonical_name


@dataclass(frozen=True)
class InstanceTable:
    """The objects of a data set in its order; crowd boxes are left out.

    Args:
        image: Index into the data set, int64 (M,).
        position: Place among the ``instances`` of that record, int64 (M,).
        label: Class, int64 (M,).
        id: Annotation id, int64 (M,); -1 where ids were not asked for.
        has_mask: Whether the record holds a segmentation, bool (M,).
    """

    image: np.ndarray
    position: np.ndarray
    label: np.ndarray
    id: np.ndarray
    has_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.image)

    @classmethod
    def of(cls, dataset: Any, with_ids: bool) -> InstanceTable:
        """Read the records of an unwrapped data set once.

        Args:
            dataset: Data set with ``get_data_info``.
            with_ids: Also find the annotation ids: ``ann_id`` of each instance where the data set
                has it (``mmdet_lt.LVISDataset``), else by image, class and box from ``ann_file``.

        Raises:
            InputError: Ids are wanted and an object has none.
        """
        rows = array('q')  # a list of tuples would take five times the memory
        file: _AnnotationIds | None = None
        for image, record in enumerate(_all_records(dataset)):
            for position, instance in enumerate(record.get('instances', [])):
                if instance.get('ignore_flag', 0):
                    continue
                found = -1
                if with_ids:
                    found = instance.get('ann_id')
                    if found is None:
                        file = file or _AnnotationIds(dataset)
                        found = file.take(record['img_id'], instance)
                label, has_mask = instance['bbox_label'], is_segmentation(instance.get('mask'))
                rows.extend((image, position, label, found, has_mask))
        table = np.array(rows, dtype=np.int64).reshape(-1, 5)
        return cls(*(table[:, k].copy() for k in range(4)), table[:, 4].astype(bool))


class _AnnotationIds:
    """Ids of the annotations that MMDetection's own data sets drop, found again by their boxes."""

    def __init__(self, dataset: Any) -> None:
        self.source = str(getattr(dataset, 'ann_file', ''))
        self.classes = [canonical_name(name) for name in dataset.metainfo['classes']]
        data = read_json(self.source, 'dataset.ann_file')
        names = {c['id']: canonical_name(c['name']) for c in data['categories']}
        self.waiting: dict[Any, list[tuple[Any, str, list[float]]]] = {}
        for a in data['annotations']:
            if not a.get('iscrowd', 0):
                entry = (a.get('id'), names[a['category_id']], a['bbox'])
                self.waiting.setdefault(a['image_id'], []).append(entry)

    def take(self, image_id: Any, instance: dict) -> int:
        """The id of an instance; two equal boxes get theirs in the order of the file."""
        x1, y1, x2, y2 = instance['bbox']
        name = self.classes[instance['bbox_label']]
        entries = self.waiting.get(image_id, [])
        for k, (found, other, (x, y, w, h)) in enumerate(entries):
            # The data sets compute the far corner in the same way, so the numbers are equal.
            if name == other and (x, y, x + w, y + h) == (x1, y1, x2, y2) and found is not None:
                del entries[k]
                return int(found)
        raise InputError(
            f'a {name!r} in image {image_id} has no annotation with an `id` in {self.source}: '
            'CAMs are stored by annotation id, so give each annotation one.'
        )
