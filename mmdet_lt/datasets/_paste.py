"""Cut, transform and place one object: arrays in, arrays out."""

from __future__ import annotations

import cv2
import numpy as np

from mmdet_lt.cam.masks import Window


def tight_window(mask: np.ndarray) -> Window | None:
    """Smallest window around the set pixels of a mask, or None if there is none."""
    rows, columns = mask.any(1), mask.any(0)
    if not rows.any():
        return None
    y0, x0 = int(rows.argmax()), int(columns.argmax())
    return x0, y0, len(columns) - int(columns[::-1].argmax()), len(rows) - int(rows[::-1].argmax())


def warp(
    crop: np.ndarray,
    mask: np.ndarray,
    flip: bool = False,
    angle: float = 0.0,
    scale: float = 1.0,
    limit: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Flip, rotate and scale an object about its centre.

    Colours are interpolated linearly, the mask takes the nearest pixel, so it stays what it was:
    a set of pixels, whatever their colour. Without rotation and scaling pixels are copied.

    Args:
        crop: Pixels around the object, (h, w) or (h, w, channels).
        mask: Foreground, bool (h, w), at least one pixel.
        flip: Mirror left and right first.
        angle: Degrees, counter-clockwise.
        scale: Factor of the size.
        limit: Largest height and width of the result; a larger object is scaled down to fit.

    Returns:
        Pixels and mask of the result, cut tightly around the mask.
    """
    crop, mask = _tight(crop, mask)
    if flip:
        crop, mask = crop[:, ::-1], mask[:, ::-1]
    height, width = mask.shape
    cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    across = abs(width * cosine) + abs(height * sine)
    down = abs(width * sine) + abs(height * cosine)
    limit_down, limit_across = limit or (np.inf, np.inf)
    scale = min(scale, limit_across / across, limit_down / down)
    if angle == 0 and scale == 1:
        return np.ascontiguousarray(crop), np.ascontiguousarray(mask)
    new_width = int(np.clip(np.ceil(across * scale - 1e-6), 1, limit_across))
    new_height = int(np.clip(np.ceil(down * scale - 1e-6), 1, limit_down))
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, scale)
    matrix[:, 2] += (new_width - width) / 2, (new_height - height) / 2
    size = (new_width, new_height)
    bits = np.ascontiguousarray(mask, dtype=np.uint8)
    new_mask = cv2.warpAffine(bits, matrix, size, flags=cv2.INTER_NEAREST).astype(bool)
    if not new_mask.any():  # an object of a few pixels that was scaled away
        return np.ascontiguousarray(crop), np.ascontiguousarray(mask)
    pixels = cv2.warpAffine(
        np.ascontiguousarray(crop),
        matrix,
        size,
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return _tight(pixels, new_mask)


def _tight(crop: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    window = tight_window(mask)
    assert window is not None, 'a mask without pixels'
    x0, y0, x1, y1 = window
    return crop[y0:y1, x0:x1], mask[y0:y1, x0:x1]


def hidden_share(
    window: Window,
    mask: np.ndarray,
    boxes: np.ndarray,
    masks: np.ndarray | None = None,
    areas: np.ndarray | None = None,
) -> np.ndarray:
    """Share of each object that a pasted one would hide, float64 (N,).

    Args:
        window: Where the pasted object goes.
        mask: Its foreground in the window, bool.
        boxes: Boxes of the objects, (N, 4).
        masks: Their masks, uint8 (N, H, W), or None: then the pixels of the boxes count.
        areas: Pixels of each mask, (N,); an object without pixels counts by its box.
    """
    x0, y0, x1, y1 = window
    share = np.zeros(len(boxes))
    by_box = np.ones(len(boxes), dtype=bool)
    if masks is not None:
        by_box = areas == 0
        covered = np.count_nonzero(masks[:, y0:y1, x0:x1] & mask.astype(np.uint8), axis=(1, 2))
        share = covered / np.maximum(areas, 1)
    for k in np.flatnonzero(by_box):
        left, top = int(np.floor(boxes[k, 0])), int(np.floor(boxes[k, 1]))
        right = max(int(np.ceil(boxes[k, 2])), left + 1)
        bottom = max(int(np.ceil(boxes[k, 3])), top + 1)
        rows = slice(max(top - y0, 0), max(bottom - y0, 0))
        columns = slice(max(left - x0, 0), max(right - x0, 0))
        inside = np.count_nonzero(mask[rows, columns])
        share[k] = inside / ((right - left) * (bottom - top))
    return share
