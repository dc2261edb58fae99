"""Example images with hits and misses of rare classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mmdet_lt.visualization.figures import HIT, MISS

#: Predictions drawn per image.
TOP = 8


def judge(
    gts: Sequence[Mapping[str, Any]], preds: Sequence[Mapping[str, Any]], iou_thr: float = 0.5
) -> tuple[list[bool], list[bool]]:
    """Which predictions are hits and which ground truth is found.

    Predictions choose in order of descending score; each takes the free box of its own label with
    the highest IoU, if that reaches ``iou_thr``. Boxes are x1, y1, x2, y2 in pixels.

    Returns:
        One bool per prediction and one per ground-truth box, in the given order.
    """
    hits, found = [False] * len(preds), [False] * len(gts)
    for p in sorted(range(len(preds)), key=lambda i: -preds[i]['score']):
        best, best_iou = None, iou_thr
        for g, gt in enumerate(gts):
            if found[g] or gt['label'] != preds[p]['label']:
                continue
            iou = box_iou(preds[p]['bbox'], gt['bbox'])
            if iou >= best_iou:
                best, best_iou = g, iou
        if best is not None:
            hits[p] = found[best] = True
    return hits, found


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes x1, y1, x2, y2."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union


def pick(examples: Sequence[Mapping[str, Any]], folder: Path, limit: int) -> list[dict[str, Any]]:
    """Readable examples with the image loaded, those with most rare boxes first."""

    def rare(example: Mapping[str, Any]) -> int:
        return sum(gt.get('group') == 'r' for gt in example.get('gt', ()))

    chosen: list[dict[str, Any]] = []
    for example in sorted(examples, key=lambda e: -rare(e)):
        path = Path(example['image'])
        try:
            with Image.open(path if path.is_absolute() else folder / path) as image:
                pixels = np.asarray(image.convert('RGB'))
        except (OSError, ValueError):  # moved or damaged image: show the others
            continue
        chosen.append(dict(example, pixels=pixels))
        if len(chosen) == limit:
            break
    return chosen


def draw(examples: Sequence[Mapping[str, Any]], columns: int = 4) -> Figure:
    """A grid of images.

    Solid green: prediction that hits (IoU at least 0.5 with a box of its class). Solid red:
    prediction that does not. Dashed red: rare box that no prediction found. Labels are marked
    with ``✓``, ``✗`` and ``missed``, so that colour is not needed.
    """
    columns = min(columns, len(examples))
    rows = -(-len(examples) // columns)
    # cells as tall as the tallest image needs, so that wide images leave no empty bands
    ratio = max(example['pixels'].shape[0] / example['pixels'].shape[1] for example in examples)
    height = 9.6 / columns * rows * min(ratio, 1.5)
    figure = Figure(figsize=(9.6, height), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, example in zip(axes.flat, examples, strict=False):
        height, width = example['pixels'].shape[:2]
        axis.imshow(example['pixels'], interpolation='nearest' if width < 300 else 'antialiased')
        gts, preds = example.get('gt', []), example.get('pred', [])
        preds = sorted(preds, key=lambda pred: -pred['score'])[:TOP]
        hits, found = judge(gts, preds)
        for pred, hit in zip(preds, hits, strict=True):
            mark = '✓' if hit else '✗'
            text = f'{mark} {pred["label"]} {pred["score"]:.2f}'
            _box(axis, pred['bbox'], text, HIT if hit else MISS, '-')
        for gt, seen in zip(gts, found, strict=True):
            if not seen and gt.get('group') == 'r':
                _box(axis, gt['bbox'], f'missed {gt["label"]}', MISS, '--', below=True)
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return figure


def _box(
    axis: Any, box: Sequence[float], text: str, colour: str, dashes: str, below: bool = False
) -> None:
    x1, y1, x2, y2 = box
    axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, ls=dashes, lw=1.6))
    label = dict(facecolor=colour, edgecolor='none', alpha=0.85, pad=1.2)
    axis.text(
        x1, y2 if below else y1, text, fontsize=6.5, color='white', clip_on=True, bbox=label,
        va='top' if below else 'bottom',
    )  # fmt: skip
