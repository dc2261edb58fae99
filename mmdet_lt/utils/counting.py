"""Turn parsed LVIS or COCO annotations into flat (image, label) arrays, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mmdet_lt.errors import InputError


def sorted_categories(data: Mapping[str, Any], source: str) -> list[Mapping[str, Any]]:
    """Categories by ascending id.

    Raises:
        InputError: A section of the file is missing, or two categories share an id.
    """
    for section in ('images', 'annotations', 'categories'):
        if not isinstance(data, Mapping) or not isinstance(data.get(section), list):
            raise InputError(f'{source} has no list `{section}`: expected LVIS or COCO format.')
    categories = sorted(data['categories'], key=lambda category: category['id'])
    if len({category['id'] for category in categories}) != len(categories):
        raise InputError(f'{source} has two categories with one id: give each its own.')
    return categories


def annotation_pairs(
    data: Mapping[str, Any], label_of: Mapping[Any, int], source: str
) -> tuple[np.ndarray, int]:
    """(image index, label) of every box but crowds, int64 (M, 2), and the number of images.

    Raises:
        InputError: An annotation names an unknown image or category.
    """
    index_of = {image['id']: i for i, image in enumerate(data['images'])}

    def pairs() -> Iterable[tuple[int, int]]:
        for annotation in data['annotations']:
            if annotation.get('iscrowd', 0) or annotation.get('ignore', 0):
                continue
            try:
                yield index_of[annotation['image_id']], label_of[annotation['category_id']]
            except KeyError as error:
                sentence = _bad_annotation(annotation, index_of, label_of, source)
                raise InputError(sentence) from error

    return np.fromiter(pairs(), dtype=np.dtype((np.int64, 2))), len(index_of)


def _bad_annotation(annotation: Mapping, images: Mapping, labels: Mapping, source: str) -> str:
    """The sentence for an annotation that names something the file does not hold."""
    which = f'annotation {annotation.get("id", "without id")} of {source}'
    for key, known in (('image_id', images), ('category_id', labels)):
        if key not in annotation:
            return f'{which} has no `{key}`: add it or remove the annotation.'
        if annotation[key] not in known:
            section = 'images' if key == 'image_id' else 'categories'
            return (
                f'{which} has {key} {annotation[key]}, expected one of the {len(known)} ids in '
                f'`{section}` of the file: correct the annotation or add the entry.'
            )
    return f'{which} is malformed.'
