"""A data set for LVIS and COCO annotation files that needs no `lvis` package."""

from __future__ import annotations

import os.path as osp
from collections.abc import Mapping
from typing import Any

import numpy as np
from mmdet.datasets.base_det_dataset import BaseDetDataset

from mmdet_lt.datasets.records import check_image_paths, record_labels, remember_labels
from mmdet_lt.errors import InputError
from mmdet_lt.registry import DATASETS
from mmdet_lt.statistics import ClassStatistics
from mmdet_lt.utils.files import read_json
from mmdet_lt.utils.names import canonical_name


@DATASETS.register_module()
class LVISDataset(BaseDetDataset):
    """LVIS v0.5, LVIS v1 or COCO annotations.

    - Classes come from the file, ordered by ascending category id, unless ``metainfo.classes``
      names them. Then labels follow *that* order, boxes of other classes are left out, and a name
      the file does not have is an error. (MMDetection's ``LVISV1Dataset`` ignores the names,
      ``CocoDataset`` orders labels by the file.)
    - Crowd boxes get ``ignore_flag=1``; boxes without area or outside of the image are left out.
    - ``class_statistics`` holds the counts of the file, taken from the same parsed data.

    Args:
        require_images: Check while loading that every image file exists (local disk, one listing
            for each folder). Missing files are reported before training starts, with their number.

    Raises:
        InputError: File missing or truncated, unknown category or image id, images missing.
    """

    METAINFO: dict[str, Any] = {}

    def __init__(self, *args: Any, require_images: bool = True, **kwargs: Any) -> None:
        self.require_images = require_images
        super().__init__(*args, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Parse the annotation file into MMDetection's records."""
        data = read_json(self.ann_file, 'dataset.ann_file')
        stats = ClassStatistics.from_annotations(data, str(self.ann_file))
        names = self._metainfo.get('classes')
        if names:
            names = (names,) if isinstance(names, str) else tuple(names)
            stats = stats.align(names, 'dataset.metainfo.classes')
        self.class_statistics = stats
        self._metainfo['classes'] = stats.classes
        label_of_name = {canonical_name(name): i for i, name in enumerate(stats.classes)}
        self.cat2label = {
            category['id']: label_of_name[canonical_name(category['name'])]
            for category in data['categories']
            if canonical_name(category['name']) in label_of_name
        }
        self.cat_ids = sorted(self.cat2label, key=self.cat2label.get)
        grouped: dict[Any, list] = {image['id']: [] for image in data['images']}
        for annotation in data['annotations']:
            grouped[annotation['image_id']].append(annotation)
        records = [self._record(image, grouped[image['id']]) for image in data['images']]
        if self.require_images and (self.backend_args or {}).get('backend', 'local') == 'local':
            check_image_paths([record['img_path'] for record in records], str(self.ann_file))
        return records

    def _record(self, image: Mapping[str, Any], annotations: list) -> dict[str, Any]:
        width, height = image['width'], image['height']
        instances = []
        for annotation in annotations:
            label = self.cat2label.get(annotation['category_id'])
            x, y, w, h = annotation['bbox']
            inside_w = min(x + w, width) - max(x, 0)
            inside_h = min(y + h, height) - max(y, 0)
            if label is None or annotation.get('ignore') or w < 1 or h < 1:
                continue
            if inside_w <= 0 or inside_h <= 0 or annotation.get('area', 1) <= 0:
                continue
            crowd = int(bool(annotation.get('iscrowd', 0)))
            instance = dict(ignore_flag=crowd, bbox=[x, y, x + w, y + h], bbox_label=label)
            if 'id' in annotation:
                instance['ann_id'] = annotation['id']
            if annotation.get('segmentation'):
                instance['mask'] = annotation['segmentation']
            instances.append(instance)
        return dict(
            img_id=image['id'],
            img_path=osp.join(self.data_prefix.get('img', '') or '', _file_name(image)),
            seg_map_path=None,
            height=height,
            width=width,
            instances=instances,
        )

    def filter_data(self) -> list[dict[str, Any]]:
        """Apply ``filter_cfg``: ``filter_empty_gt`` and ``min_size``, in training only.

        An image counts as empty when no usable box is left after parsing, crowds aside.
        """
        if self.test_mode or not self.filter_cfg:
            return self.data_list
        no_empty = self.filter_cfg.get('filter_empty_gt', False)
        min_size = self.filter_cfg.get('min_size', 0)
        kept = [
            record
            for record in self.data_list
            if min(record['width'], record['height']) >= min_size
            and not (no_empty and all(i['ignore_flag'] for i in record['instances']))
        ]
        if self.data_list and not kept:
            raise InputError(
                f'`filter_cfg={dict(self.filter_cfg)}` leaves none of the {len(self.data_list)} '
                f'images of {self.ann_file}: loosen it or check the annotations.'
            )
        return kept

    def _serialize_data(self) -> tuple[np.ndarray, np.ndarray]:
        # The records are still objects here; unpickling them again would take seconds for LVIS.
        labels = record_labels(self.data_list)
        data_bytes, data_address = super()._serialize_data()
        remember_labels(self, data_bytes, labels)
        return data_bytes, data_address


def _file_name(image: Mapping[str, Any]) -> str:
    """Path below ``data_prefix.img``; LVIS v1 gives it as the tail of ``coco_url`` only."""
    if image.get('file_name'):
        return image['file_name']
    if image.get('coco_url'):
        return '/'.join(image['coco_url'].rsplit('/', 2)[-2:])
    raise InputError(f'image {image["id"]} has neither `file_name` nor `coco_url`: add one.')
