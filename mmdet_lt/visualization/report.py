"""One self-contained HTML page about one or several finished runs."""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmdet_lt.errors import InputError
from mmdet_lt.statistics import ClassStatistics
from mmdet_lt.utils.files import write_text_atomic
from mmdet_lt.visualization import examples, figures
from mmdet_lt.visualization.runs import RunRecord, load_run

_NAMES = {'bbox': 'Boxes', 'segm': 'Masks'}
_COLUMNS = ('AP', 'AP50', 'APr', 'APc', 'APf')
_EXAMPLES = 8
#: Figures are 9.6 inches wide and shown at 900 pixels or so: sharp on dense screens.
_DPI = 170

_STYLE = """
:root { --ink: #1d2329; --soft: #5d6872; --line: #d9dee2; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 3rem 0 .3rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .3rem 0 .9rem; max-width: 46rem; }
.lead, .note { color: var(--soft); }
.note { font-size: .9rem; }
.missing { border-left: 4px solid #E69F00; background: #fdf6e7; padding: .6rem .9rem; }
img { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; }
th, td { padding: .38rem .9rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); font-size: .9rem; border-bottom-color: var(--ink); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.best { font-weight: 700; }
.chip { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px;
  margin-right: .5rem; }
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; } }
"""


def write_report(
    work_dirs: Mapping[str, str | os.PathLike],
    out_html: str | os.PathLike,
    statistics: Any = None,
    title: str = 'Long-tail detection report',
) -> Path:
    """Write the report; figures are embedded, so the file can be sent on its own.

    Args:
        work_dirs: Label of each run and its work directory, in which (at any depth) lie mmengine's
            ``vis_data/scalars.json``, the ``lvis_detail.json`` of :class:`mmdet_lt.LVISMetric`
            (``detail_file``), and optionally ``result.json`` or ``seconds.json`` with ``seconds``,
            and ``examples.json``. What is missing is named in place of its figure.
        out_html: The file to write.
        statistics: Training statistics for the class histogram: a file, a dict or a
            :class:`ClassStatistics`. Default: the counts inside ``lvis_detail.json``.
        title: Heading of the page.

    Returns:
        Path of the page.

    Raises:
        InputError: No run is given, a work directory does not exist or the statistics are wrong.
    """
    if not work_dirs:
        raise InputError('a report needs at least one work directory, found none.')
    runs = [load_run(label, folder) for label, folder in work_dirs.items()]
    known = None if statistics is None else ClassStatistics.from_any(statistics, key='statistics')
    parts = [f'<h1>{html.escape(title)}</h1>']
    parts.append(f'<p class="lead">{_plural(len(runs), "run")}: {_labels(runs)}.</p>')
    parts += [f'<p class="missing">{html.escape(p)}</p>' for run in runs for p in run.problems]
    metrics = sorted({metric for run in runs for metric in run.metrics()})
    parts += _results(runs, metrics)
    for metric in metrics:
        suffix = f' ({_NAMES[metric].lower()})' if len(metrics) > 1 else ''
        parts += _quality(runs, metric, suffix, known)
    if not metrics:
        parts.append(_missing('The figures of AP by class and group need lvis_detail.json.'))
    parts += _training(runs)
    parts += _pictures(runs)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n'
        '<body><main>\n' + '\n'.join(parts) + '\n</main></body></html>\n'
    )
    write_text_atomic(out_html, page)
    return Path(out_html)


def _results(runs: Sequence[RunRecord], metrics: Sequence[str]) -> list[str]:
    parts = ['<h2>Results</h2>']
    if not metrics:
        parts.append(
            _missing(
                'No run has results: neither lvis_detail.json, result.json nor the log names an AP.'
            )
        )
    else:
        parts.append(
            '<p class="note">In percent. APr, APc, APf: rare, common and frequent classes. Best '
            'value of a column in bold.</p>'
        )
    for metric in metrics:
        if len(metrics) > 1:
            parts.append(f'<h3>{_NAMES[metric]}</h3>')
        parts.append(_table(runs, metric))
    return parts


def _table(runs: Sequence[RunRecord], metric: str) -> str:
    best = {key: max(run.overall(metric).get(key, -1) for run in runs) for key in _COLUMNS}
    head = ''.join(f'<th>{name}</th>' for name in ('Run', *_COLUMNS, 'seconds'))
    rows = []
    for i, run in enumerate(runs):
        overall = run.overall(metric)
        chip = f'<span class="chip" style="background:{figures.style(i)["color"]}"></span>'
        cells = [f'<td>{chip}{html.escape(run.label)}</td>']
        for key in _COLUMNS:
            value = overall.get(key, -1)
            mark = ' class="best"' if len(runs) > 1 and 0 <= value == best[key] else ''
            cells.append(f'<td{mark}>{"–" if value < 0 else f"{100 * value:.2f}"}</td>')
        seconds = '–' if run.seconds is None else f'{run.seconds:,.0f}'
        rows.append(f'<tr>{"".join(cells)}<td>{seconds}</td></tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _quality(
    runs: Sequence[RunRecord], metric: str, suffix: str, statistics: ClassStatistics | None
) -> list[str]:
    """The four figures that come from the evaluation."""
    overall = {run.label: run.overall(metric) for run in runs}
    details = {run.label: run.detail.get(metric) or {} for run in runs}
    classes = {
        label: {row['name']: row['ap'] for row in detail.get('classes', ())}
        for label, detail in details.items()
    }
    counts, groups = _class_counts(details, statistics)
    histogram_source = classes if counts else {label: {} for label in classes}
    why = 'lvis_detail.json (set `detail_file` of mmdet_lt.LVISMetric)'
    if any(classes.values()) and not counts:
        why = 'training counts: give the training annotation file as statistics'
    return [
        *_section(
            f'Classes and their AP{suffix}',
            'Each class from frequent to rare: how many training images it has, and its AP.',
            histogram_source,
            lambda data: figures.class_histogram(data, counts, groups),
            why,
            runs,
        ),
        *_section(
            f'AP by frequency group{suffix}',
            'Mean AP of all, rare, common and frequent classes.',
            overall,
            figures.ap_by_group,
            'results of an evaluation',
            runs,
        ),
        *_section(
            f'Precision and recall by group{suffix}',
            'Precision at IoU 0.5, averaged over the classes of a group.',
            {label: detail.get('pr') or {} for label, detail in details.items()},
            figures.precision_recall,
            'the `pr` curves of lvis_detail.json',
            runs,
        ),
        *_section(
            f'Score calibration by group{suffix}',
            'How many detections of a score are right. On the dashed line a score is a '
            'probability; below it the detector is over-confident.',
            {label: detail.get('calibration') or {} for label, detail in details.items()},
            figures.calibration,
            'the `calibration` of lvis_detail.json',
            runs,
        ),
    ]


def _class_counts(
    details: Mapping[str, Mapping], statistics: ClassStatistics | None
) -> tuple[dict[str, int], dict[str, str]]:
    """Training images and group of each class name, from the statistics or the detail files."""
    if statistics is not None:
        names = statistics.classes
        return (
            dict(zip(names, statistics.image_count.tolist(), strict=True)),
            dict(zip(names, statistics.groups.tolist(), strict=True)),
        )
    rows = [row for detail in details.values() for row in detail.get('classes', ())]
    rows = [row for row in rows if row.get('image_count') is not None]
    return (
        {row['name']: row['image_count'] for row in rows},
        {row['name']: row['group'] for row in rows},
    )


def _training(runs: Sequence[RunRecord]) -> list[str]:
    ratios: dict[str, dict] = {}
    losses: dict[str, Any] = {}
    for run in runs:
        curves = {group: run.curve(f'grad_ratio_{group}') for group in figures.GROUPS}
        ratios[run.label] = {g: c for g, c in curves.items() if len(c[0])}
        loss = run.curve('loss')
        losses[run.label] = loss if len(loss[0]) else ()
    return [
        *_section(
            'Gradient ratio over time',
            'Gradient that asks for a class over gradient that suppresses it, summed over the '
            'classes of a group. At 1 (dashed) they balance; rare classes start far below.',
            ratios,
            figures.gradient_ratio,
            '`grad_ratio_r`, `grad_ratio_c`, `grad_ratio_f` in vis_data/scalars.json',
            runs,
        ),
        *_section(
            'Training loss',
            'The sum of all losses, as logged, with its running mean.',
            losses,
            figures.loss_curve,
            '`loss` in vis_data/scalars.json',
            runs,
        ),
    ]


def _section(
    heading: str, text: str, data: Mapping[str, Any], draw: Any, needs: str, runs: Any
) -> list[str]:
    """A figure of the runs that have the data, or a sentence about what is missing.

    Runs without data keep their place, so that every run keeps its colour in all figures.
    """
    parts = [f'<h2>{html.escape(heading)}</h2>']
    lacking = [label for label, values in data.items() if not values]
    if len(lacking) == len(data):
        return [*parts, _missing(f'No figure: no run has {needs}.')]
    parts += [f'<p class="note">{html.escape(text)}</p>']
    try:
        figure = draw(data)
    except (KeyError, TypeError, ValueError) as error:  # a file of another version or by hand
        return [*parts, _missing(f'No figure: the data of {needs} is malformed ({error}).')]
    parts.append(_image(figure, heading))
    if lacking:
        parts.append(_missing(f'Not shown: {", ".join(lacking)}, without {needs}.'))
    return parts


def _pictures(runs: Sequence[RunRecord]) -> list[str]:
    parts = ['<h2>Hits and misses of rare classes</h2>']
    if not any(run.examples for run in runs):
        return [*parts, _missing('No pictures: no run has examples.json.')]
    parts.append(
        '<p class="note">✓ green: prediction with IoU of at least 0.5 to a box of its class. ✗ '
        'red: any other prediction. Dashed red: rare box that no prediction found. The '
        f'{examples.TOP} best predictions of each image.</p>'
    )
    for run in runs:
        parts.append(f'<h3>{html.escape(run.label)}</h3>')
        if not run.examples:
            parts.append(_missing('This run has no examples.json.'))
            continue
        try:
            chosen = examples.pick(run.examples, run.examples_folder, _EXAMPLES)
            figure = examples.draw(chosen) if chosen else None
        except (KeyError, TypeError, ValueError) as error:
            parts.append(_missing(f'No pictures: examples.json is malformed ({error!r}).'))
            continue
        if figure is None:
            parts.append(_missing('No pictures: no image of examples.json can be read.'))
        else:
            parts.append(_image(figure, f'Example images of {run.label}'))
    return parts


def _image(figure: Figure, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=_DPI, metadata=dict(Software=None))
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def _missing(text: str) -> str:
    """A highlighted sentence; words in backticks are set as code."""
    marked = re.sub('`(.+?)`', r'<code>\1</code>', html.escape(text))
    return f'<p class="missing">{marked}</p>'


def _labels(runs: Sequence[RunRecord]) -> str:
    return ', '.join(html.escape(run.label) for run in runs)


def _plural(count: int, noun: str) -> str:
    return f'{count} {noun}' if count == 1 else f'{count} {noun}s'
