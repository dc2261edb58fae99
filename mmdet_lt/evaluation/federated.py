"""The LVIS evaluation protocol on flat arrays.

Source: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance Segmentation", CVPR 2019,
arXiv 1908.03195. The results equal those of the authors' lvis-api on the same input; only
(category, image) pairs that hold something are visited, so time and memory grow with the number
of detections, not with images x categories.

Federated rules: an image is annotated for the categories it contains and for those it lists as
verified absent. Detections of other categories are dropped. Where a category is marked as not
exhaustively annotated in an image, unmatched detections of it are ignored.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdet_lt.evaluation.ground_truth import GroundTruth
from mmdet_lt.evaluation.matching import box_candidates, mask_candidates, match

#: Area ranges in square pixels, both ends included: all, small, medium, large.
AREA_NAMES = ('all', 's', 'm', 'l')
AREA_RANGES = np.array([(0, 1e5**2), (0, 32**2), (32**2, 96**2), (96**2, 1e5**2)])
RECALLS = np.linspace(0.0, 1.0, 101)
IOU_THRS = np.linspace(0.5, 0.95, 10)
#: Edges of the score bins of the calibration curves.
SCORE_EDGES = np.linspace(0.0, 1.0, 21)


@dataclass(eq=False)
class Detections:
    """Predictions of a data set, grouped by image in ascending order.

    Attributes:
        image: Image index of the ground truth, int64 (D,).
        category: Category index of the ground truth, int64 (D,).
        scores: float64 (D,).
        boxes: x, y, width, height in pixels, float64 (D, 4); unused for masks.
        areas: Of the box or, for masks, of the mask, in square pixels, float64 (D,).
        rles: Compressed run-length masks, or None for boxes.
    """

    image: np.ndarray
    category: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    rles: Sequence[dict] | None = None


@dataclass(eq=False)
class FederatedResult:
    """Curves of the evaluated categories; -1 marks categories without ground truth.

    Attributes:
        iou_thrs: (T,).
        precision: Interpolated precision at 101 recalls, float64 (T, 101, K, 4).
        recall: Recall of all detections, float64 (T, K, 4).
        num_gt: Boxes that count, int64 (K,).
        calibration: Per score bin: detections, sum of scores, true positives at the first IoU
            threshold, float64 (K, 20, 3). Ignored detections are left out.
    """

    iou_thrs: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    num_gt: np.ndarray
    calibration: np.ndarray

    def summary(self, groups: np.ndarray) -> dict[str, float]:
        """The 13 numbers of LVIS as fractions, not rounded; -1 where nothing can be measured.

        Args:
            groups: 'r', 'c', 'f' or '' for each category, (K,).
        """
        every = slice(None)
        values = {
            'AP': mean_valid(self.precision[..., 0]),
            'AP50': mean_valid(self.precision[self._at(0.5), ..., 0]),
            'AP75': mean_valid(self.precision[self._at(0.75), ..., 0]),
        }
        for a, name in enumerate(AREA_NAMES[1:], 1):
            values[f'AP{name}'] = mean_valid(self.precision[..., a])
        for group in 'rcf':
            values[f'AP{group}'] = mean_valid(self.precision[:, :, groups == group, 0])
        for a, name in enumerate(AREA_NAMES):
            values['AR' if a == 0 else f'AR{name}'] = mean_valid(self.recall[:, every, a])
        return values

    def per_class(self) -> dict[str, np.ndarray]:
        """``ap``, ``ap50``, ``ap75`` and ``ar`` of each category, float64 (K,), -1 if undefined."""
        p50, p75 = self.precision[self._at(0.5), ..., 0], self.precision[self._at(0.75), ..., 0]
        columns = range(len(self.num_gt))
        return dict(
            ap=np.array([mean_valid(self.precision[:, :, k, 0]) for k in columns]),
            ap50=np.array([mean_valid(p50[:, :, k]) for k in columns]),
            ap75=np.array([mean_valid(p75[:, :, k]) for k in columns]),
            ar=np.array([mean_valid(self.recall[:, k, 0]) for k in columns]),
        )

    def _at(self, iou: float) -> np.ndarray:
        return np.flatnonzero(np.isclose(self.iou_thrs, iou, rtol=0, atol=1e-9))


def mean_valid(values: np.ndarray) -> float:
    """Mean without the entries that are -1; -1 if none is left."""
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def evaluate_federated(
    truth: GroundTruth,
    detections: Detections,
    categories: np.ndarray | None = None,
    images: np.ndarray | None = None,
    iou_thrs: np.ndarray = IOU_THRS,
    progress: bool = False,
) -> FederatedResult:
    """Evaluate boxes, or masks when ``detections.rles`` is given.

    The limit of detections per image is the caller's: it applies before anything is dropped.

    Args:
        truth: Ground truth, with ``rles`` for masks.
        detections: Predictions of the evaluated images.
        categories: Category indices to evaluate, int64 (K,). Default: all.
        images: Images to evaluate, bool (I,). Default: all.
        iou_thrs: Thresholds, float64 (T,).
        progress: Draw a progress bar on a terminal.
    """
    if categories is None:
        categories = np.arange(len(truth.names))
    use = np.ones(len(truth.image), dtype=bool) if images is None else images[truth.image]
    gts = np.flatnonzero(use)
    gts = gts[np.argsort(truth.category[gts], kind='stable')]
    dets, partial = _sorted_rows(truth, detections, gts)
    gt_bounds = np.searchsorted(truth.category[gts], np.stack([categories, categories + 1]))
    det_bounds = np.searchsorted(detections.category[dets], np.stack([categories, categories + 1]))
    num_thrs, num_cats, num_areas = len(iou_thrs), len(categories), len(AREA_RANGES)
    result = FederatedResult(
        np.asarray(iou_thrs, dtype=np.float64),
        -np.ones((num_thrs, len(RECALLS), num_cats, num_areas)),
        -np.ones((num_thrs, num_cats, num_areas)),
        np.zeros(num_cats, dtype=np.int64),
        np.zeros((num_cats, len(SCORE_EDGES) - 1, 3)),
    )
    for k in _track(num_cats, progress and len(dets) > 200_000):
        g = gts[slice(*gt_bounds[:, k])]
        rows = slice(*det_bounds[:, k])
        _evaluate_category(truth, detections, g, dets[rows], partial[rows], result, k)
    return result


def _sorted_rows(
    truth: GroundTruth, detections: Detections, gts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Judged detections by (category, image, score), and whether their pair is incomplete."""
    codes = truth.pair(detections.category, detections.image)
    present = truth.pair(truth.category[gts], truth.image[gts])
    judged = truth.exhaustive[detections.image]
    judged = judged | np.isin(codes, truth.negative) | np.isin(codes, present)
    rows = np.flatnonzero(judged)
    keys = (-detections.scores[rows], detections.image[rows], detections.category[rows])
    rows = rows[np.lexsort(keys)]
    return rows, np.isin(codes[rows], truth.not_exhaustive)


def _evaluate_category(
    truth: GroundTruth,
    detections: Detections,
    g: np.ndarray,
    d: np.ndarray,
    partial: np.ndarray,
    result: FederatedResult,
    k: int,
) -> None:
    """Fill column ``k`` of ``result`` from ground-truth rows ``g`` and detection rows ``d``."""
    low, high = AREA_RANGES[:, :1], AREA_RANGES[:, 1:]
    ignored = truth.ignored[g] | (truth.areas[g] < low) | (truth.areas[g] > high)
    image, crowd = detections.image[d], truth.crowd[g]
    min_iou = min(float(result.iou_thrs.min()), 1 - 1e-10)
    if detections.rles is None:
        pairs = box_candidates(
            image, detections.boxes[d], truth.image[g], truth.boxes[g], crowd, min_iou
        )
    else:
        det_rles, gt_rles = [detections.rles[i] for i in d], [truth.rles[i] for i in g]
        pairs = mask_candidates(image, det_rles, truth.image[g], gt_rles, crowd, min_iou)
    matched, dropped = match(pairs, image, ignored, crowd, result.iou_thrs)
    areas = detections.areas[d]
    excused = (areas < low) | (areas > high) | partial
    dropped |= ~matched & excused[:, None, :]
    # Equal scores keep the order (image id, rank within the image) of the sorted rows.
    scores = detections.scores[d]
    order = np.argsort(-scores, kind='stable')
    result.num_gt[k] = np.count_nonzero(~ignored[0])
    for a in range(len(AREA_RANGES)):
        num_gt = np.count_nonzero(~ignored[a])
        if num_gt:
            hit, out = matched[a][:, order], dropped[a][:, order]
            precision, recall = _curves(hit & ~out, ~hit & ~out, num_gt)
            result.precision[:, :, k, a], result.recall[:, k, a] = precision, recall
    counted = ~dropped[0, 0]
    result.calibration[k] = _score_bins(scores[counted], matched[0, 0, counted])


def _curves(tp: np.ndarray, fp: np.ndarray, num_gt: int) -> tuple[np.ndarray, np.ndarray]:
    """Interpolated precision (T, 101) and final recall (T,) of sorted detections (T, D).

    ``precision(r) = max of TP / (TP + FP) over all cut-offs with recall >= r``, 0 beyond the
    highest recall.
    """
    tp, fp = np.cumsum(tp, axis=1, dtype=np.float64), np.cumsum(fp, axis=1, dtype=np.float64)
    sampled = np.zeros((len(tp), len(RECALLS)))
    if not tp.shape[1]:
        return sampled, np.zeros(len(tp))
    recall = tp / num_gt
    precision = tp / (fp + tp + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    for t, row in enumerate(recall):
        at = np.searchsorted(row, RECALLS, side='left')
        reached = at < len(row)
        sampled[t, reached] = precision[t, at[reached]]
    return sampled, recall[:, -1]


def _score_bins(scores: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Detections, sum of scores and hits per bin of :data:`SCORE_EDGES`, (20, 3)."""
    bins = len(SCORE_EDGES) - 1
    index = np.clip(np.searchsorted(SCORE_EDGES, scores, side='right') - 1, 0, bins - 1)
    weights = (None, scores, hit.astype(np.float64))
    return np.stack([np.bincount(index, w, minlength=bins) for w in weights], axis=1)


def _track(count: int, progress: bool):
    """``range(count)``, with a progress bar when somebody is looking."""
    if not progress or not sys.stdout.isatty():
        yield from range(count)
        return
    from mmengine.utils import ProgressBar

    bar = ProgressBar(count)
    for k in range(count):
        yield k
        bar.update()
    sys.stdout.write('\n')
