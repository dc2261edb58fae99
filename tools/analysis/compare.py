"""Train several configs at an equal number of iterations; print and plot mean and spread.

Example:
    python tools/analysis/compare.py configs/quickstart/a.py configs/quickstart/b.py --seeds 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmdet_lt.engine import launch
from mmdet_lt.engine.compare import compare
from mmdet_lt.engine.compare_table import main_metric, plot, table
from mmdet_lt.errors import InputError


def main(argv: list[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', help='config files, as PATH or LABEL=PATH')
    parser.add_argument('--seeds', type=int, default=3, help='number of seeds, from 0')
    parser.add_argument('--iters', type=int, help='iterations of every run')
    parser.add_argument('--out', default='work_dirs/compare', help='folder of the runs')
    parser.add_argument('--jobs', type=int, default=1, help='trainings side by side')
    parser.add_argument('--metric', help='metric of the plot, such as bbox_APr; AP by default')
    parser.add_argument(
        '--overwrite', action='store_true', help='delete runs of other configs in the way'
    )
    args = parser.parse_args(argv)
    configs = parse_labels(args.configs)
    results = compare(
        configs, args.out, range(args.seeds), args.iters, args.jobs, overwrite=args.overwrite
    )
    key = args.metric or main_metric(results)
    text = table(results, key)
    (Path(args.out) / 'table.md').write_text(text + '\n')
    print(text)
    plot(results, Path(args.out) / f'{key.rpartition("/")[2]}.png', key)


def parse_labels(items: list[str]) -> dict[str, str]:
    """Label to path of ``PATH`` (named by its stem) or ``LABEL=PATH``.

    Raises:
        InputError: Two configs have the same label, or one cannot be the name of a folder.
    """
    configs: dict[str, str] = {}
    for item in items:
        label, _, path = item.partition('=') if '=' in item else ('', '', item)
        label = label or Path(path).stem
        if label in ('', '.', '..') or '/' in label:
            raise InputError(f'a label must be the name of a folder, found {label!r} in {item!r}.')
        if label in configs:
            raise InputError(
                f'{configs[label]} and {path} have the same label {label!r}: give them as '
                'LABEL=PATH.'
            )
        configs[label] = path
    return configs


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
