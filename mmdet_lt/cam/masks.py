r"""Windows, resampling, thresholds and run-length codes of class activation maps.

A map covers the box of its object: cell ``(r, c)`` of an ``(n, m)`` map is the ``n x m``-th part of
the box. The mask covers the *window* of the box, the smallest rectangle of whole pixels around it
inside the image. Coordinates: pixel ``x`` spans ``[x, x + 1)``, its centre is ``x + 0.5``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from mmdet_lt.errors import InputError

Window = tuple[int, int, int, int]


def box_window(box: Sequence[float], height: int, width: int) -> Window | None:
    """Smallest ``(x0, y0, x1, y1)`` of whole pixels around a box, cut at the image.

    Returns:
        The window, its end exclusive, or None if the box has no pixel in the image.
    """
    x0, y0 = max(math.floor(box[0]), 0), max(math.floor(box[1]), 0)
    x1, y1 = min(math.ceil(box[2]), width), min(math.ceil(box[3]), height)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _weights(start: int, stop: int, origin: float, length: float, cells: int) -> np.ndarray:
    """Linear interpolation as a matrix: pixels ``start .. stop - 1`` by cells, float32."""
    centre = (np.arange(start, stop) + 0.5 - origin) / max(length, 1e-6) * cells - 0.5
    centre = np.clip(centre, 0, cells - 1)
    low = np.minimum(centre.astype(np.int64), max(cells - 2, 0))
    matrix = np.zeros((stop - start, cells), dtype=np.float32)
    rows = np.arange(stop - start)
    matrix[rows, low] = 1 - (centre - low)
    if cells > 1:
        matrix[rows, low + 1] = centre - low
    return matrix


def resample(cam: np.ndarray, box: Sequence[float], window: Window) -> np.ndarray:
    """Bilinear values of a map at the pixel centres of a window.

    Args:
        cam: Map over ``box``, (n, m).
        box: ``x1, y1, x2, y2`` in pixels of the image.
        window: See :func:`box_window`.

    Returns:
        float32 (y1 - y0, x1 - x0); pixels outside of the outermost cell centres take their value.
    """
    x0, y0, x1, y1 = window
    down = _weights(y0, y1, box[1], box[3] - box[1], cam.shape[0])
    across = _weights(x0, x1, box[0], box[2] - box[0], cam.shape[1])
    return down @ cam.astype(np.float32, copy=False) @ across.T


def foreground(values: np.ndarray, threshold: float = 1.0) -> tuple[np.ndarray, bool]:
    """``values >= threshold * mean(values)``.

    Args:
        values: Resampled map, at least one value, none negative.
        threshold: Multiple of the mean; 1 in the paper, 0.75 in its code.

    Returns:
        Mask, bool, of the same shape, and whether the map was flat. A flat map (all zeros where no
        feature speaks for the class) says nothing about the shape: its mask is full.
    """
    low, high = float(values.min()), float(values.max())
    if not high - low > 1e-5 * abs(high):  # also a map of NaN
        return np.ones(values.shape, dtype=bool), True
    # The largest value is never below the mean, so the mask cannot be empty.
    limit = min(threshold * float(values.mean(dtype=np.float64)), high)
    return values >= limit, False


def encode(mask: np.ndarray) -> bytes:
    """COCO's compressed run-length code of a mask (h, w)."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))['counts']


def decode(counts: bytes, height: int, width: int) -> np.ndarray:
    """Inverse of :func:`encode`, bool (height, width)."""
    return coco_mask.decode(dict(size=[height, width], counts=counts)).astype(bool)


def is_segmentation(value: Any) -> bool:
    """Whether an annotation's ``segmentation`` holds polygons or a run-length code."""
    if isinstance(value, Mapping):
        return bool(value.get('counts')) and len(value.get('size') or ()) == 2
    polygons = [p for p in value or () if len(p) >= 6 and len(p) % 2 == 0]
    return bool(polygons)


def segmentation_mask(value: Any, height: int, width: int) -> np.ndarray:
    """Mask of an annotation's ``segmentation`` in its image, bool (height, width).

    Raises:
        InputError: The run-length code is of an image of another size.
    """
    if isinstance(value, Mapping):
        if list(value['size']) != [height, width]:
            raise InputError(
                f'a segmentation of size {list(value["size"])} belongs to an image of '
                f'[{height}, {width}] (height, width): correct the annotation file.'
            )
        code = value
        if isinstance(value['counts'], list):
            code = coco_mask.frPyObjects(dict(value), height, width)
    else:
        polygons = [p for p in value if len(p) >= 6 and len(p) % 2 == 0]
        code = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return coco_mask.decode(code).astype(bool)
