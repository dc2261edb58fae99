"""Turn work directories into one HTML page with tables and figures.

Example:
    python tools/analysis/report.py baseline=work_dirs/a seesaw=work_dirs/b --out report.html
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmdet_lt.engine import launch
from mmdet_lt.errors import InputError
from mmdet_lt.visualization import write_report


def label_runs(items: list[str]) -> dict[str, str]:
    """Label of each ``PATH`` or ``LABEL=PATH``: the shortest end of the path that is unique.

    Raises:
        InputError: One label is given twice.
    """
    runs: dict[str, str] = {}
    plain = [item for item in items if '=' not in item]
    for item in items:
        label, _, path = item.rpartition('=')
        if not label:
            parts, others = Path(path).resolve().parts, [p for p in plain if p != item]
            depth = 1
            while depth < len(parts) and any(
                Path(other).resolve().parts[-depth:] == parts[-depth:] for other in others
            ):
                depth += 1
            label = '/'.join(parts[-depth:])
        if label in runs:
            raise InputError(f'two work directories are labelled {label!r}: use LABEL=PATH.')
        runs[label] = path
    return runs


def main(argv: list[str] | None = None) -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dirs', nargs='+', help='work directories, as PATH or LABEL=PATH')
    parser.add_argument('--out', default='report.html', help='the page to write')
    parser.add_argument('--statistics', help='training annotation file or class statistics')
    parser.add_argument('--title', default='Long-tail detection report', help='heading')
    args = parser.parse_args(argv)
    path = write_report(label_runs(args.work_dirs), args.out, args.statistics, args.title)
    print(f'{path} ({path.stat().st_size / 1e6:.1f} MB)')


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
