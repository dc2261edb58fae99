"""Tables and plots of the runs of :mod:`mmdet_lt.engine.compare`."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mmdet_lt.errors import InputError

#: Columns of the table: header, key of the metric, factor. Those that no run has are left out.
COLUMNS = (
    ('AP', 'bbox_AP', 100),
    ('AP50', 'bbox_AP50', 100),
    ('APr', 'bbox_APr', 100),
    ('APc', 'bbox_APc', 100),
    ('APf', 'bbox_APf', 100),
    ('mAP', 'bbox_mAP', 100),
    ('mAP50', 'bbox_mAP_50', 100),
    ('VOC mAP', 'mAP', 100),
    ('seconds', 'seconds', 1),
)


def main_metric(results: list[dict[str, Any]]) -> str:
    """The metric to plot if none is named: AP of LVIS, COCO or VOC, else the first there is."""
    done = [result for result in results if 'failed' not in result]
    found = [name for result in done for name in result if '/' in name]
    names = {name.rpartition('/')[2] for name in found}
    known = [key for _, key, _ in COLUMNS if key in names]
    if not found:
        raise InputError('no run has a metric to plot: `val_evaluator` must be set.')
    return known[0] if known else found[0]


def metric(result: dict[str, Any], key: str) -> float:
    """One value of a result, whatever prefix the metric has.

    Raises:
        InputError: The run has no such metric.
    """
    for name, value in result.items():
        if name == key or name.endswith(f'/{key}'):
            return float(value)
    known = sorted(name for name in result if '/' in name)
    raise InputError(f'`--metric` must be one of {known} (prefix optional), found {key!r}.')


def values_by_label(results: list[dict[str, Any]], key: str) -> dict[str, list[float]]:
    """Values of one metric of the runs of each recipe that did not fail."""
    values: dict[str, list[float]] = {result['label']: [] for result in results}
    for result in results:
        if 'failed' not in result:
            values[result['label']].append(metric(result, key))
    return values


def _columns(results: list[dict[str, Any]], key: str | None) -> list[tuple[str, str, float]]:
    """Columns that the runs have, with that of ``key`` among them."""
    done = [result for result in results if 'failed' not in result]
    names = {name.rpartition('/')[2] for result in done for name in result}
    columns = [column for column in COLUMNS if column[1] in names]
    if key is not None and key.rpartition('/')[2] not in [column[1] for column in columns]:
        columns.insert(0, (key, key, 1))
    return columns


def table(results: list[dict[str, Any]], key: str | None = None) -> str:
    """Markdown table, mean ± standard deviation over seeds, with failed runs listed below it.

    Args:
        results: What :func:`compare` returned.
        key: A metric that gets a column even if it is not one of ``COLUMNS``.
    """
    labels = list(dict.fromkeys(result['label'] for result in results))
    columns = _columns(results, key)
    rows = [['recipe', 'iterations', 'seeds', *(name for name, _, _ in columns)]]
    by_column = {name: values_by_label(results, column) for name, column, _ in columns}
    for label in labels:
        mine = [result for result in results if result['label'] == label]
        failed = sum('failed' in result for result in mine)
        seeds = f'{len(mine)} ({failed} failed)' if failed else str(len(mine))
        row = [label, str(mine[0]['iters']), seeds]
        for name, _, factor in columns:
            row.append(_mean_and_spread(by_column[name][label], factor, name))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        '| ' + ' | '.join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + ' |' for r in rows
    ]
    rule = '|' + '|'.join('-' * (w + 2) for w in widths) + '|'
    failures = [
        f'- failed: {result["label"]}, seed {result["seed"]}: {result["failed"]}'
        for result in results
        if 'failed' in result
    ]
    return '\n'.join([lines[0], rule, *lines[1:], *([''] if failures else []), *failures])


def _mean_and_spread(values: list[float], factor: float, name: str) -> str:
    if not values:
        return 'failed'
    scaled = np.array(values) * factor
    digits = 0 if name == 'seconds' else 1
    text = f'{scaled.mean():.{digits}f}'
    return f'{text} ± {scaled.std(ddof=1):.{digits}f}' if len(values) > 1 else text


def plot(results: list[dict[str, Any]], path: str | os.PathLike, key: str = 'bbox_AP') -> None:
    """Draw the mean of one metric with its standard deviation, and each seed as a dot.

    Args:
        results: What :func:`compare` returned.
        path: The image file.
        key: The metric.

    Raises:
        InputError: The runs have no such metric.
    """
    values = values_by_label(results, key)
    figure = Figure(figsize=(7.2, 1.0 + 0.45 * len(values)), layout='constrained')
    axis = figure.subplots()
    for row, seeds in enumerate(values.values()):
        if not seeds:
            axis.text(0, row, ' failed', va='center')
            continue
        spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
        axis.barh(row, np.mean(seeds), xerr=spread, color='#8FB8D8', ecolor='#222222', capsize=3)
        axis.plot(seeds, [row] * len(seeds), 'o', color='#0072B2', markersize=4)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.set_xlabel(f'{key}, mean ± standard deviation over seeds')
    axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=150)
