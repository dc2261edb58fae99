"""Assign the detections of one category to its ground truth, all thresholds and areas at once.

Symbols: ``D`` detections sorted by (image, descending score), ``G`` ground-truth boxes sorted by
image, ``T`` IoU thresholds, ``A`` area ranges, ``P`` candidate pairs whose IoU reaches the lowest
threshold. Only candidates can ever be matched, so everything else is left out of the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

#: Detections whose pairs are expanded together; bounds the memory to some 10 MB.
_CHUNK = 50_000


class Candidates(NamedTuple):
    """Pairs in the order of the detections, then of the ground truth: index, index, IoU; (P,)."""

    detection: np.ndarray
    truth: np.ndarray
    iou: np.ndarray


def box_candidates(
    det_image: np.ndarray,
    det_boxes: np.ndarray,
    gt_image: np.ndarray,
    gt_boxes: np.ndarray,
    gt_crowd: np.ndarray,
    min_iou: float,
) -> Candidates:
    """Pairs of one image with ``IoU >= min_iou``; boxes are x, y, width, height, float64.

    ``IoU = intersection / union``; for crowd regions the union is the detection's own area, so
    that a detection inside the region has IoU 1.
    """
    begin = np.searchsorted(gt_image, det_image, side='left')
    count = np.searchsorted(gt_image, det_image, side='right') - begin
    parts = []
    for start in range(0, len(det_image), _CHUNK):
        rows = slice(start, start + _CHUNK)
        number = count[rows]
        det = np.repeat(np.arange(start, start + len(number)), number)
        # position of the pair within its detection's run of ground truth
        offset = np.arange(len(det)) - np.repeat(np.cumsum(number) - number, number)
        gt = begin[det] + offset
        iou = _box_iou(det_boxes[det], gt_boxes[gt], gt_crowd[gt])
        keep = iou >= min_iou
        parts.append((det[keep], gt[keep], iou[keep]))
    return _join(parts)


def _box_iou(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Row-wise IoU in the operation order of pycocotools, so that thresholds agree exactly."""
    width = np.minimum(a[:, 0] + a[:, 2], b[:, 0] + b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    height = np.minimum(a[:, 1] + a[:, 3], b[:, 1] + b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    inter = np.maximum(width, 0) * np.maximum(height, 0)
    area = a[:, 2] * a[:, 3]
    union = np.where(crowd, area, area + b[:, 2] * b[:, 3] - inter)
    return np.divide(inter, union, out=np.zeros_like(inter), where=inter > 0)


def mask_candidates(
    det_image: np.ndarray,
    det_rles: Sequence[dict],
    gt_image: np.ndarray,
    gt_rles: Sequence[dict],
    gt_crowd: np.ndarray,
    min_iou: float,
) -> Candidates:
    """As :func:`box_candidates` for compressed run-length masks."""
    parts = []
    for image in np.intersect1d(det_image, gt_image):
        d0, d1 = np.searchsorted(det_image, [image, image + 1])
        g0, g1 = np.searchsorted(gt_image, [image, image + 1])
        crowd = gt_crowd[g0:g1].astype(int).tolist()
        iou = mask_utils.iou(list(det_rles[d0:d1]), list(gt_rles[g0:g1]), crowd)
        det, gt = np.nonzero(iou >= min_iou)
        parts.append((det + d0, gt + g0, iou[det, gt]))
    return _join(parts)


def _join(parts: list[tuple]) -> Candidates:
    if not parts:
        empty = np.empty(0, dtype=np.int64)
        return Candidates(empty, empty, np.empty(0))
    return Candidates(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def match(
    pairs: Candidates,
    det_image: np.ndarray,
    gt_ignored: np.ndarray,
    gt_crowd: np.ndarray,
    iou_thrs: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy matching of the LVIS and COCO protocols.

    Detections choose in order of descending score. Each takes, among the free boxes of its image
    that it overlaps enough, the one with the highest IoU (the later one of equals); boxes that
    count are preferred to ignored ones. A crowd region never stops being free.

    Args:
        pairs: Candidates, sorted by detection.
        det_image: Image of each detection, ascending, (D,).
        gt_ignored: Box does not count in an area range, bool (A, G).
        gt_crowd: Box is a crowd region, bool (G,).
        iou_thrs: Thresholds, float64 (T,).

    Returns:
        ``matched`` and ``on_ignored`` (matched to an ignored box), both bool (A, T, D).
    """
    shape = (len(gt_ignored), len(iou_thrs), len(det_image))
    matched, on_ignored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    if not len(pairs.iou):
        return matched, on_ignored
    # a threshold of 1 would reject equal boxes with a rounding error in their IoU
    limits = np.minimum(iou_thrs, 1 - 1e-10)
    choices = np.bincount(pairs.detection, minlength=shape[2])
    contested = np.zeros(gt_ignored.shape[1], dtype=bool)
    contested[pairs.truth[choices[pairs.detection] > 1]] = True
    simple = ~contested[pairs.truth]

    # Boxes that are the only choice of all their candidates: the first candidate wins.
    for t, limit in enumerate(limits):
        rows = np.flatnonzero(simple & (pairs.iou >= limit))
        first = np.unique(pairs.truth[rows], return_index=True)[1]
        win = np.union1d(rows[first], rows[gt_crowd[pairs.truth[rows]]])
        matched[:, t, pairs.detection[win]] = True
        on_ignored[:, t, pairs.detection[win]] = gt_ignored[:, pairs.truth[win]]

    hard = np.flatnonzero(~simple)
    if len(hard):
        image = det_image[pairs.detection[hard]]
        for rows in np.split(hard, np.flatnonzero(np.diff(image)) + 1):
            _match_image(
                Candidates(*(column[rows] for column in pairs)),
                gt_ignored,
                gt_crowd,
                limits,
                matched,
                on_ignored,
            )
    return matched, on_ignored


def _match_image(
    pairs: Candidates,
    gt_ignored: np.ndarray,
    gt_crowd: np.ndarray,
    limits: np.ndarray,
    matched: np.ndarray,
    on_ignored: np.ndarray,
) -> None:
    """Sequential matching within one image; every (area, threshold) is one lane of the arrays."""
    dets, d = np.unique(pairs.detection, return_inverse=True)
    gts, g = np.unique(pairs.truth, return_inverse=True)
    # reversed columns: argmax returns the first of equals, the protocol keeps the last
    g = len(gts) - 1 - g
    gts = gts[::-1]
    ious = np.full((len(dets), len(gts)), -1.0)
    ious[d, g] = pairs.iou
    num_areas, num_thrs = len(gt_ignored), len(limits)
    ignored = np.repeat(gt_ignored[:, gts], num_thrs, axis=0)
    limit = np.tile(limits, num_areas)[:, None]
    crowd = gt_crowd[gts]
    free = np.ones(ignored.shape, dtype=bool)
    lanes = np.arange(len(limit))
    for i, det in enumerate(dets):
        usable = free & (ious[i] >= limit)
        counting = usable & ~ignored
        usable = np.where(counting.any(axis=1, keepdims=True), counting, usable)
        best = np.where(usable, ious[i], -1.0).argmax(axis=1)
        hit = usable[lanes, best]
        taken = hit & ~crowd[best]
        free[lanes[taken], best[taken]] = False
        matched[:, :, det] = hit.reshape(num_areas, num_thrs)
        on_ignored[:, :, det] = (hit & ignored[lanes, best]).reshape(num_areas, num_thrs)
