"""What a data sampler does to a data set: counts before and after, repeats, a figure."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mmengine.dataset import DefaultSampler

from mmdet_lt.datasets.records import unwrap_datasets
from mmdet_lt.datasets.samplers._labels import ImageClasses
from mmdet_lt.errors import InputError
from mmdet_lt.statistics import GROUP_NAMES, GROUPS, ClassStatistics

#: The three states of a data set that are compared.
STATES = ('before', 'expected', 'drawn')


@dataclass(frozen=True)
class SamplingSummary:
    """Counts of one epoch: each image once (``before``), in expectation, and as drawn.

    Args:
        statistics: Class counts and groups of the data set.
        draws: Draws of each image in each state, float64 (n,).
        images: Draws that contain each class in each state, float64 (C,).
        instances: Boxes of each class among the draws in each state, float64 (C,).
    """

    statistics: ClassStatistics
    draws: dict[str, np.ndarray]
    images: dict[str, np.ndarray]
    instances: dict[str, np.ndarray]

    @property
    def repeats(self) -> dict[str, float]:
        """Share of draws of an image that was drawn before in the same epoch, for each state.

        In expectation: of the draws above one for each image. An image expected 0.4 times is drawn
        at most once, since numbers are rounded up or down.
        """
        return {s: float(np.maximum(d - 1, 0).sum() / d.sum()) for s, d in self.draws.items()}

    @property
    def never(self) -> dict[str, int]:
        """Images that are not drawn in the epoch."""
        return {state: int((draws == 0).sum()) for state, draws in self.draws.items()}


def summarise(sampler: Any, statistics: ClassStatistics, epoch: int = 0) -> SamplingSummary:
    """Look at one epoch of a sampler, on all ranks together.

    Args:
        sampler: A sampler of mmdet_lt or MMEngine's ``DefaultSampler``, of one process.
        statistics: Class statistics of its data set; they give the groups.
        epoch: The epoch, from 0.

    Raises:
        InputError: The sampler is of another kind, whose draws are not known in advance.
    """
    contents = ImageClasses.of(sampler.dataset)
    number = contents.num_images
    if hasattr(sampler, 'image_probabilities'):
        expected = sampler.image_probabilities(epoch) * sampler.epoch_size
        drawn = [int(index) for index in sampler.epoch_indices(epoch)[: sampler.epoch_size]]
    elif type(sampler) is DefaultSampler:
        sampler.set_epoch(epoch)
        expected, drawn = np.ones(number), list(sampler)
    else:
        raise InputError(
            'the preview knows the samplers of mmdet_lt and DefaultSampler, found '
            f'{type(sampler).__name__} in `train_dataloader.sampler`.'
        )
    draws = dict(
        before=np.ones(number),
        expected=expected,
        drawn=np.bincount(drawn, minlength=number).astype(float),
    )
    classes = contents.num_classes

    def count(each: np.ndarray, weight: np.ndarray | int) -> np.ndarray:
        return np.bincount(contents.label, each[contents.image] * weight, classes)

    return SamplingSummary(
        statistics,
        draws,
        {state: count(each, 1) for state, each in draws.items()},
        {state: count(each, contents.boxes) for state, each in draws.items()},
    )


# ---- text --------------------------------------------------------------------------------------


def group_table(summary: SamplingSummary) -> str:
    """Images and instances of the groups, as totals over their classes and shares."""
    rows = [['group', 'classes', *_columns()]]
    index = {g: summary.statistics.group_index(g) for g in GROUPS}
    for group, members in [*index.items(), ('all', np.arange(summary.statistics.num_classes))]:
        cells = [
            f'{v[s][members].sum():,.0f} ({_share(v[s][members].sum(), v[s].sum())})'
            for v in (summary.images, summary.instances)
            for s in STATES
        ]
        rows.append([GROUP_NAMES.get(group, group), str(len(members)), *cells])
    return _align(rows)


def class_table(summary: SamplingSummary, limit: int = 60) -> str:
    """Images and instances of the classes, from rare to frequent; the first ``limit`` ones."""
    stats = summary.statistics
    order = np.argsort(stats.image_count, kind='stable')
    rows = [['class', 'group', *_columns(), 'factor']]
    for c in order[:limit]:
        cells = [
            f'{v[s][c]:,.1f}' if s == 'expected' else f'{v[s][c]:,.0f}'
            for v in (summary.images, summary.instances)
            for s in STATES
        ]
        before = summary.images['before'][c]
        factor = f'{summary.images["expected"][c] / before:.2f}' if before else '-'
        rows.append([stats.classes[c], str(stats.groups[c]), *cells, factor])
    more = len(order) - limit
    return _align(rows) + (f'\n... and {more} more frequent classes' if more > 0 else '')


def repeat_lines(summary: SamplingSummary, dataset: Any, number: int = 10) -> str:
    """Share of repeats, images left out, and the most repeated images with their classes."""
    repeats, never = summary.repeats, summary.never
    draws = summary.draws['drawn']
    lines = [
        f'repeats: {repeats["expected"]:.1%} of the draws expected, {repeats["drawn"]:.1%} drawn',
        f'images never drawn in the epoch: {never["drawn"]:,} of {len(draws):,} '
        f'({never["expected"]:,} cannot be)',
    ]
    top = np.lexsort((-summary.draws['expected'], -draws))[:number]
    top = [int(i) for i in top if draws[i] > 1]
    if top:
        lines.append('most repeated images:')
    names, labels = summary.statistics.classes, ImageClasses.of(dataset)
    for i in top:
        inside = labels.label[labels.image == i]
        rare = sorted(inside, key=lambda c: summary.statistics.image_count[c])[:3]
        lines.append(
            f'  {draws[i]:4.0f} x (expected {summary.draws["expected"][i]:.2f})  '
            f'{_image_name(dataset, i)}: {", ".join(names[c] for c in rare)}'
            + (' ...' if len(inside) > 3 else '')
        )
    return '\n'.join(lines)


def class_csv(summary: SamplingSummary) -> str:
    """All classes in label order, as comma-separated values."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator='\n')
    names = [f'{kind}_{state}' for kind in ('images', 'instances') for state in STATES]
    writer.writerow(['class', 'group', *names])
    stats = summary.statistics
    for c, name in enumerate(stats.classes):
        values = [v[s][c] for v in (summary.images, summary.instances) for s in STATES]
        writer.writerow([name, stats.groups[c], *(f'{value:.6g}' for value in values)])
    return out.getvalue()


def _columns() -> list[str]:
    return [f'{kind} {state}' for kind in ('images', 'instances') for state in STATES]


def _share(part: float, whole: float) -> str:
    return f'{part / whole:.1%}' if whole else '-'


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _image_name(dataset: Any, index: int) -> str:
    leaves = unwrap_datasets(dataset)
    if len(leaves) == 1 and len(leaves[0]) == len(dataset):
        record = leaves[0].get_data_info(index)
        return str(record.get('img_path') or record.get('img_id', index))
    return f'image {index}'


# ---- figure ------------------------------------------------------------------------------------


def sampling_figure(summary: SamplingSummary, title: str) -> Figure:
    """Share of the boxes of each class before and after, and how often images are drawn."""
    stats = summary.statistics
    order = {'f': 0, 'c': 1, 'r': 2}
    ranked = sorted(
        range(stats.num_classes), key=lambda c: (order[str(stats.groups[c])], -stats.image_count[c])
    )
    figure = Figure(figsize=(9.6, 6.4), layout='constrained')
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 2))
    looks = dict(
        before=dict(color='#8A8A8A', linestyle='-'),
        drawn=dict(color='#56B4E9', linestyle='', marker='.', markersize=5),
        expected=dict(color='#D55E00', linestyle='-'),
    )
    x = np.arange(stats.num_classes)
    for state, look in looks.items():
        shares = summary.instances[state] / max(summary.instances[state].sum(), 1)
        # A log axis has no zero: classes without a box are gaps.
        values = np.where(shares > 0, 100 * shares, np.nan)[ranked]
        name = {'before': 'each image once', 'drawn': 'one drawn epoch'}.get(state, state)
        top.plot(x, values, label=name, linewidth=1.6, drawstyle='steps-mid', **look)
    top.set(yscale='log', ylabel='share of the boxes (%)', title=title)
    top.set_xlabel('classes, by frequency group and number of training images')
    edges = np.cumsum([int((stats.groups == g).sum()) for g in ('f', 'c')])
    for edge in edges:
        if 0 < edge < stats.num_classes:
            top.axvline(edge - 0.5, color='#8A8A8A', linewidth=0.8, linestyle=':')
    top.legend(frameon=False, fontsize=9)
    draws = summary.draws['drawn'].astype(int)
    counts = np.bincount(draws)
    bottom.bar(np.arange(len(counts)), counts, color='#56B4E9', width=0.85)
    bottom.set(yscale='log', xlabel='draws of an image in the drawn epoch', ylabel='images')
    for axis in (top, bottom):
        axis.spines[['top', 'right']].set_visible(False)
        axis.tick_params(labelsize=9)
    return figure
