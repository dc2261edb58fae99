"""Ground truth of an LVIS or COCO file as flat arrays, the form the evaluation works on.

Symbols: ``I`` images in ascending id order, ``K`` categories in ascending id order, ``G``
annotations. A (category, image) pair is coded as the integer ``category * I + image``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import read_json


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Annotations of a data set for federated evaluation.

    Attributes:
        image_ids: Ids, ascending, length I.
        image_sizes: Height and width in pixels, int64 (I, 2); 0 where the file has none.
        category_ids: Ids, ascending, length K.
        names: Category names, length K.
        frequency: 'r', 'c', 'f' or '' for each category, (K,).
        train_counts: ``image_count`` and ``instance_count`` of each category as stated by the
            file (LVIS: of the training set), int64 (K, 2); -1 where it has none.
        image: Image index of each annotation, int64 (G,), file order within an image.
        category: Category index, int64 (G,).
        boxes: ``x, y, width, height`` in pixels, float64 (G, 4).
        areas: ``area`` of the file in square pixels, float64 (G,).
        ignored: Annotation is never a target: ``ignore`` or ``iscrowd``, bool (G,).
        crowd: Annotation is a region that absorbs any number of detections, bool (G,).
        rles: Run-length masks when loaded with ``masks=True``, else None.
        negative: Pairs verified absent (``neg_category_ids``), sorted int64.
        not_exhaustive: Pairs with missing boxes (``not_exhaustive_category_ids``), sorted int64.
        exhaustive: Image is annotated for every category, bool (I,).
    """

    image_ids: list
    image_sizes: np.ndarray
    category_ids: list
    names: tuple[str, ...]
    frequency: np.ndarray
    train_counts: np.ndarray
    image: np.ndarray
    category: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    ignored: np.ndarray
    crowd: np.ndarray
    rles: list[dict] | None
    negative: np.ndarray
    not_exhaustive: np.ndarray
    exhaustive: np.ndarray

    def pair(self, category: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Integer code of (category, image) pairs, int64."""
        return category * len(self.image_ids) + image


def check_annotation_file(path: str | os.PathLike) -> None:
    """Cheap check that a local annotation file is there and not cut off.

    Reading the first and last bytes takes no time on any file, so a missing or truncated file
    stops a training when it is set up, not after its first epoch.

    Raises:
        InputError: The file is missing, empty or does not begin with '{' and end with '}'.
    """
    path = Path(path)
    size = path.stat().st_size if path.is_file() else 0
    ends = b''
    if size:
        with open(path, 'rb') as file:
            head = file.read(4096)
            file.seek(max(0, size - 4096))
            ends = head.lstrip(b'\xef\xbb\xbf \t\r\n')[:1] + file.read().rstrip()[-1:]
    if ends != b'{}':
        data = read_json(path)  # raises the sentence for a missing or truncated file
        raise InputError(
            f'annotation file {path} must hold a JSON object in LVIS or COCO format, found '
            f'{type(data).__name__}: correct `ann_file`.'
        )


def load_ground_truth(path: str | os.PathLike, masks: bool = False) -> GroundTruth:
    """Read an LVIS or COCO annotation file.

    Args:
        path: The file.
        masks: Also decode the segmentations (polygons or RLE) to compressed RLE.

    Raises:
        InputError: The file is missing, truncated, lacks a section or contradicts itself.
    """
    return build_ground_truth(read_json(path), str(path), masks)


def build_ground_truth(data: Any, source: str = 'annotations', masks: bool = False) -> GroundTruth:
    """Flat arrays of parsed annotations; see :func:`load_ground_truth`."""
    for section in ('images', 'annotations', 'categories'):
        if not isinstance(data, Mapping) or not isinstance(data.get(section), list):
            raise InputError(f'{source} has no list `{section}`: expected LVIS or COCO format.')
    images = _by_id(data['images'], 'image', source)
    categories = _by_id(data['categories'], 'category', source)
    image_index = {image['id']: i for i, image in enumerate(images)}
    category_index = {category['id']: k for k, category in enumerate(categories)}
    sizes = np.array(
        [(image.get('height') or 0, image.get('width') or 0) for image in images], dtype=np.int64
    ).reshape(-1, 2)

    where, what = _indices(data['annotations'], image_index, category_index, source)
    order = np.argsort(where, kind='stable')
    annotations = [data['annotations'][i] for i in order]
    where, what = where[order], what[order]
    rles = None
    if masks:
        rles = [_to_rle(ann, sizes[i], source) for ann, i in zip(annotations, where, strict=True)]
    crowd = np.array([bool(ann.get('iscrowd', 0)) for ann in annotations], dtype=bool)
    ignored = np.array([bool(ann.get('ignore', 0)) for ann in annotations], dtype=bool)
    boxes = _boxes(annotations, rles, source)
    absent = _pairs(images, 'neg_category_ids', category_index)
    partial = _pairs(images, 'not_exhaustive_category_ids', category_index)
    return GroundTruth(
        image_ids=list(image_index),
        image_sizes=sizes,
        category_ids=list(category_index),
        names=_names(categories, source),
        frequency=_frequency(categories, source),
        train_counts=np.array(
            [(c.get('image_count', -1), c.get('instance_count', -1)) for c in categories],
            dtype=np.int64,
        ).reshape(-1, 2),
        image=where,
        category=what,
        boxes=boxes,
        areas=_areas(annotations, boxes, rles),
        ignored=ignored | crowd,
        crowd=crowd,
        rles=rles,
        negative=absent,
        not_exhaustive=partial,
        exhaustive=np.array(['neg_category_ids' not in image for image in images], dtype=bool),
    )


def _by_id(records: Sequence[Mapping], what: str, source: str) -> list[Mapping]:
    """Records in ascending id order; ids must exist and be unique."""
    if any(not isinstance(record, Mapping) or 'id' not in record for record in records):
        raise InputError(f'{source} has an {what} without `id`: give every {what} its own id.')
    records = sorted(records, key=lambda record: record['id'])
    for first, second in zip(records, records[1:], strict=False):
        if first['id'] == second['id']:
            raise InputError(f'{source} has two {what} entries with id {first["id"]}: keep one.')
    return records


def _indices(
    annotations: Sequence[Mapping], images: Mapping, categories: Mapping, source: str
) -> tuple[np.ndarray, np.ndarray]:
    try:
        where = [images[ann['image_id']] for ann in annotations]
        what = [categories[ann['category_id']] for ann in annotations]
    except KeyError:
        for ann in annotations:
            for key, known in (('image_id', images), ('category_id', categories)):
                if ann.get(key) not in known:
                    raise InputError(
                        f'annotation {ann.get("id", "without id")} of {source} has {key} '
                        f'{ann.get(key)!r}, which the file does not list: correct the annotation.'
                    ) from None
        raise
    return np.array(where, dtype=np.int64), np.array(what, dtype=np.int64)


def _names(categories: Sequence[Mapping], source: str) -> tuple[str, ...]:
    names = tuple(str(category.get('name', category['id'])) for category in categories)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f'category name {twice!r} occurs twice in {source}: rename one.')
    return names


def _frequency(categories: Sequence[Mapping], source: str) -> np.ndarray:
    values = [category.get('frequency') or '' for category in categories]
    for category, value in zip(categories, values, strict=True):
        if value not in ('', 'r', 'c', 'f'):
            raise InputError(
                f"`frequency` of category {category['id']} in {source} must be 'r', 'c' or 'f', "
                f'found {value!r}.'
            )
    return np.array(values, dtype='<U1')


def _pairs(images: Sequence[Mapping], key: str, categories: Mapping) -> np.ndarray:
    """Sorted codes of the (category, image) pairs that images list under ``key``."""
    codes = [
        categories[category] * len(images) + i
        for i, image in enumerate(images)
        for category in image.get(key) or ()
        if category in categories
    ]
    return np.unique(np.array(codes, dtype=np.int64))


def _boxes(annotations: Sequence[Mapping], rles: list[dict] | None, source: str) -> np.ndarray:
    """Boxes (G, 4); a file with masks only gets the boxes of its masks."""
    rows = []
    for i, ann in enumerate(annotations):
        box = ann.get('bbox')
        if box is None and rles is not None:
            box = mask_utils.toBbox(rles[i])
        if box is None or len(box) != 4:
            raise InputError(
                f'annotation {ann.get("id", "without id")} of {source} needs `bbox` as '
                f'[x, y, width, height], found {box!r}.'
            )
        rows.append(box)
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def _areas(
    annotations: Sequence[Mapping], boxes: np.ndarray, rles: list[dict] | None
) -> np.ndarray:
    """``area`` of the file; where it has none, that of the mask if loaded, else of the box."""
    areas = np.empty(len(annotations), dtype=np.float64)
    for i, ann in enumerate(annotations):
        area = ann.get('area')
        if area is None:
            area = boxes[i, 2] * boxes[i, 3] if rles is None else mask_utils.area(rles[i])
        areas[i] = area
    return areas


def _to_rle(annotation: Mapping, size: np.ndarray, source: str) -> dict:
    """Compressed RLE of a segmentation given as polygons, counts or RLE."""
    which = f'annotation {annotation.get("id", "without id")} of {source}'
    value = annotation.get('segmentation')
    if value is None:
        raise InputError(f'{which} has no `segmentation`: use metric="bbox" for files with boxes.')
    try:
        if isinstance(value, Mapping):
            if isinstance(value['counts'], (str, bytes)):
                return dict(size=list(value['size']), counts=value['counts'])
            return mask_utils.frPyObjects(dict(value), *value['size'])
        height, width = (int(v) for v in size)
        if not height or not width:
            raise InputError(f'{which} is a polygon but its image has no `height` and `width`.')
        if not value:
            return mask_utils.encode(np.zeros((height, width), dtype=np.uint8, order='F'))
        return mask_utils.merge(mask_utils.frPyObjects(value, height, width))
    except InputError:
        raise
    except Exception as error:  # pycocotools raises bare Exception, KeyError, TypeError, ...
        raise InputError(f'{which} has a `segmentation` that is no polygon or RLE mask.') from error
