"""Per-class results, curves and calibration as plain values for a JSON file or a table."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdet_lt.evaluation.federated import RECALLS, SCORE_EDGES, FederatedResult, mean_valid

FORMAT = 'mmdet_lt.lvis_detail.v1'


def describe(
    result: FederatedResult, names: list[str], groups: np.ndarray, counts: np.ndarray
) -> dict[str, Any]:
    """Everything the HTML report draws; undefined values are None.

    Args:
        result: Evaluation of K categories.
        names: Category names, length K.
        groups: 'r', 'c', 'f' or '', (K,).
        counts: Training images and instances per category, -1 if unknown, int64 (K, 2).

    Returns:
        ``overall``: the 13 numbers. ``classes``: one dict per category. ``pr``: precision at IoU
        0.5 over 101 recalls, averaged over the categories of a group. ``calibration``: per score
        bin and group the number of detections, their mean score and the share of true positives
        (IoU 0.5).
    """
    values = result.per_class()
    classes = [
        dict(
            name=name,
            group=str(groups[k]) or None,
            image_count=_or_none(counts[k, 0]),
            instance_count=_or_none(counts[k, 1]),
            num_gt=int(result.num_gt[k]),
            **{key: _or_none(column[k]) for key, column in values.items()},
        )
        for k, name in enumerate(names)
    ]
    at = np.flatnonzero(np.isclose(result.iou_thrs, 0.5, rtol=0, atol=1e-9))
    curves: dict[str, Any] = dict(recall=RECALLS.tolist())
    calibration: dict[str, Any] = dict(bins=SCORE_EDGES.tolist())
    for group in 'rcf':
        member = groups == group
        precision = result.precision[at][:, :, member, 0]
        means = [mean_valid(precision[:, r]) for r in range(len(RECALLS))]
        curves[group] = means if max(means) > -1 else []
        count, score, hit = result.calibration[member].sum(axis=0).T
        calibration[group] = dict(
            count=count.astype(int).tolist(),
            confidence=[s / n if n else None for s, n in zip(score.tolist(), count, strict=True)],
            precision=[h / n if n else None for h, n in zip(hit.tolist(), count, strict=True)],
        )
    return dict(overall=result.summary(groups), classes=classes, pr=curves, calibration=calibration)


def class_table(detail: dict[str, Any]) -> str:
    """Per-class results as text, in percent, rarest group first."""
    rows = sorted(detail['classes'], key=lambda row: 'rcf'.find(row['group'] or 'f'))
    width = max([len(row['name']) for row in rows] + [5])
    lines = [f'{"class":<{width}}  group  images  boxes      AP    AP50    AP75      AR']
    for row in rows:
        cells = ['     -' if row[key] is None else f'{100 * row[key]:6.2f}'
                 for key in ('ap', 'ap50', 'ap75', 'ar')]  # fmt: skip
        images = '-' if row['image_count'] is None else row['image_count']
        lines.append(
            f'{row["name"]:<{width}}  {row["group"] or "-":>5}  {images:>6}  {row["num_gt"]:>5}  '
            + '  '.join(cells)
        )
    return '\n'.join(lines)


def _or_none(value: Any) -> Any:
    """JSON value; -1 means undefined."""
    value = value.item()
    return None if value < 0 else value
