"""The figures of the report. Each takes plain values of several runs and returns a figure.

``runs`` are ordered dicts from label to data, empty data for a run that has none; a label has the
same colour and dash pattern in every figure. Colours are those of Okabe and Ito ("Color Universal
Design", 2008), which people with any colour vision can tell apart; hits and misses also differ in
line style and in a mark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

GROUPS = {'r': 'rare', 'c': 'common', 'f': 'frequent'}
RUN_COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#333333')
_DASHES = ('-', '--', ':', '-.')
_BANDS = {'r': '#F3D9C9', 'c': '#E7E4DC', 'f': '#D7E5EF'}
_INK, _GREY, _GRID = '#222222', '#8A8A8A', '#E3E3E3'
HIT, MISS = '#009E73', '#D55E00'


def style(index: int) -> dict[str, str]:
    """Colour and dashes of the ``index``-th run; different for the first 28 runs."""
    turn, colour = divmod(index, len(RUN_COLOURS))
    return dict(color=RUN_COLOURS[colour], linestyle=_DASHES[turn % len(_DASHES)])


def _figure(rows: int, columns: int, height: float, **kwargs: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(9.6, height), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for axis in axes.flat:
        axis.spines[['top', 'right']].set_visible(False)
        axis.spines[['left', 'bottom']].set_color(_GREY)
        axis.tick_params(colors=_INK, labelsize=9, length=3)
        axis.grid(axis='y', color=_GRID, linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def _legend(figure: Figure, axis: Any, count: int) -> None:
    """One legend above all panels; a single run needs none."""
    if count > 1:
        handles, labels = axis.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc='outside upper left', ncols=min(count, 4), frameon=False,
            fontsize=9,
        )  # fmt: skip


def class_histogram(
    runs: Mapping[str, Mapping[str, float | None]],
    counts: Mapping[str, int],
    groups: Mapping[str, str],
) -> Figure:
    """Training images per class, and AP per class below it, classes from frequent to rare.

    Args:
        runs: For each run the AP of each class name, None where undefined.
        counts: Training images of each class name.
        groups: 'r', 'c' or 'f' of each class name.
    """
    order = {'f': 0, 'c': 1, 'r': 2}
    names = sorted(counts, key=lambda n: (order.get(groups.get(n, ''), 3), -counts[n], n))
    x = np.arange(len(names))
    figure, axes = _figure(2, 1, 5.0, sharex=True, height_ratios=(2, 3))
    top, bottom = axes[:, 0]
    width = 0.85 if len(names) < 150 else 1.0
    top.bar(x, [counts[n] for n in names], width=width, color='#6E7F8D', linewidth=0)
    top.set_yscale('log')
    top.set_ylim(bottom=0.7)
    top.set_ylabel('training images')
    few = len(names) <= 60
    for i, (label, values) in enumerate(runs.items()):
        ap = np.array([np.nan if values.get(n) is None else values[n] for n in names], float)
        look = style(i)
        bottom.scatter(
            x, ap, s=16 if few else 5, color=look['color'], alpha=0.75 if few else 0.25, linewidth=0
        )
        bottom.plot(x, _running_mean(ap, max(len(names) // 12, 3)), lw=2, label=label, **look)
    bottom.set_ylim(0, max(bottom.get_ylim()[1], 0.1))
    bottom.yaxis.set_major_formatter(PercentFormatter(1, symbol=''))
    bottom.set_ylabel('AP (line: running mean)')
    bottom.set_xlabel('classes, by frequency group and number of training images')
    bottom.set_xlim(-0.6, len(names) - 0.4)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for group, name in GROUPS.items():
        member = [i for i, n in enumerate(names) if groups.get(n) == group]
        if member:
            for axis in (top, bottom):
                axis.axvspan(member[0] - 0.5, member[-1] + 0.5, color=_BANDS[group], lw=0, zorder=0)
            top.text(
                (member[0] + member[-1]) / 2, 1.02, f'{name} ({len(member)})', fontsize=9,
                ha='center', va='bottom', transform=top.get_xaxis_transform(), color=_INK,
            )  # fmt: skip
    _legend(figure, bottom, len(runs))
    return figure


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over ``width`` neighbours without undefined entries."""
    known = np.isfinite(values)
    kernel = np.ones(min(width, len(values)))
    total = np.convolve(np.where(known, values, 0), kernel, mode='same')
    number = np.convolve(known.astype(float), kernel, mode='same')
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0)


def ap_by_group(runs: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bars of AP, APr, APc and APf for each run; undefined values (-1) are left out."""
    keys = {'AP': 'all classes', **{f'AP{g}': name for g, name in GROUPS.items()}}
    figure, axes = _figure(1, 1, 3.4)
    axis = axes[0, 0]
    width = 0.8 / max(len(runs), 1)
    for i, (label, overall) in enumerate(runs.items()):
        heights = [overall.get(key, -1) for key in keys]
        x = np.arange(len(keys)) + (i - (len(runs) - 1) / 2) * width
        shown = [max(h, 0) for h in heights]
        # dashes cannot mark a bar, so a second round of colours is hatched
        hatch = '///' if i >= len(RUN_COLOURS) else None
        bars = axis.bar(
            x, shown, width * 0.92, color=style(i)['color'], label=label, hatch=hatch,
            edgecolor='white', linewidth=0,
        )  # fmt: skip
        if len(runs) <= 6:
            texts = ['–' if h < 0 else f'{100 * h:.1f}' for h in heights]
            axis.bar_label(bars, texts, fontsize=8, color=_INK, padding=2)
    axis.set_xticks(np.arange(len(keys)), list(keys.values()))
    axis.set_ylim(top=max(axis.get_ylim()[1] * 1.08, 0.01))
    axis.yaxis.set_major_formatter(PercentFormatter(1, symbol=''))
    axis.set_ylabel('AP')
    _legend(figure, axis, len(runs))
    return figure


def precision_recall(runs: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Mean precision at IoU 0.5 over recall, one panel per group.

    Args:
        runs: For each run ``recall`` (101,) and 'r', 'c', 'f' (101,) or empty.
    """
    figure, axes = _figure(1, 3, 3.6, sharey=True)
    for axis, (group, name) in zip(axes[0], GROUPS.items(), strict=True):
        for i, (label, curve) in enumerate(runs.items()):
            values = curve.get(group) or []
            recall = curve['recall'] if values else []
            axis.plot(recall, values, lw=1.8, label=label, **style(i))
        axis.set_title(name, fontsize=10)
        axis.set(xlabel='recall', xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.25, 0.5, 0.75))
    axes[0, 0].set_ylabel('precision (IoU 0.5)')
    _legend(figure, axes[0, 0], len(runs))
    return figure


def calibration(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of true detections over score, one panel per group; bins with under 5 are left out.

    A point below the diagonal means over-confident, above it under-confident. The size of a point
    grows with the number of detections in its bin.
    """
    figure, axes = _figure(1, 3, 3.8, sharey=True)
    for axis, (group, name) in zip(axes[0], GROUPS.items(), strict=True):
        axis.plot([0, 1], [0, 1], color=_GREY, lw=1, ls=(0, (4, 3)))
        for i, (label, data) in enumerate(runs.items()):
            part = data.get(group) or dict(count=[], confidence=[], precision=[])
            rows = [
                row
                for row in zip(part['confidence'], part['precision'], part['count'], strict=True)
                if row[2] >= 5
            ]
            x, y, n = np.array(rows, dtype=float).reshape(-1, 3).T
            axis.plot(x, y, lw=1.4, label=label, **style(i))
            axis.scatter(x, y, s=6 + 8 * np.log10(np.maximum(n, 1)), color=style(i)['color'])
        axis.set_title(name, fontsize=10)
        axis.set(xlabel='score', xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.25, 0.5, 0.75))
    axes[0, 0].set_ylabel('true detections (IoU 0.5)')
    _legend(figure, axes[0, 0], len(runs))
    return figure


def gradient_ratio(runs: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> Figure:
    """Positive over negative gradient of the classifier over iterations, one panel per group."""
    figure, axes = _figure(1, 3, 3.4, sharey=True)
    for axis, (group, name) in zip(axes[0], GROUPS.items(), strict=True):
        axis.axhline(1, color=_GREY, lw=1, ls=(0, (4, 3)))
        for i, (label, curves) in enumerate(runs.items()):
            x, y = curves.get(group, (np.empty(0), np.empty(0)))
            y = np.where(np.asarray(y) > 0, y, np.nan)  # a log axis has no zero
            axis.plot(x, y, lw=1.6, label=label, **style(i))
        axis.set_title(name, fontsize=10)
        axis.set(xlabel='iteration', yscale='log')
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 0].set_ylabel('positive / negative gradient')
    _legend(figure, axes[0, 0], len(runs))
    return figure


def loss_curve(runs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Training loss over iterations: the logged values faint, their running mean strong."""
    figure, axes = _figure(1, 1, 3.2)
    axis = axes[0, 0]
    for i, (label, points) in enumerate(runs.items()):
        x, y = points or ((), ())
        if len(x) > 20:
            axis.plot(x, y, lw=0.7, alpha=0.3, color=style(i)['color'])
            y = _running_mean(y, max(len(y) // 25, 3))
        marker = 'o' if len(x) == 1 else None
        axis.plot(x, y, lw=1.8, label=label, marker=marker, **style(i))
    axis.set(xlabel='iteration', ylabel='training loss')
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axis, len(runs))
    return figure
