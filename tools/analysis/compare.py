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
from mmdet_lt.engine.compare_table import plot, table


def main(argv: list[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', help='config files, as PATH or LABEL=PATH')
    parser.add_argument('--seeds', type=int, default=3, help='number of seeds, from 0')
    parser.add_argument('--iters', type=int, help='iterations of every run')
    parser.add_argument('--out', default='work_dirs/compare', help='folder of the runs')
    parser.add_argument('--jobs', type=int, default=1, help='trainings side by side')
    parser.add_argument('--metric', default='bbox_AP', help='metric of the plot, such as bbox_APr')
    args = parser.parse_args(argv)
    configs = {}
    for item in args.configs:
        label, _, path = item.rpartition('=')
        configs[label or Path(path).stem] = path
    results = compare(configs, args.out, range(args.seeds), args.iters, args.jobs)
    text = table(results, args.metric)
    (Path(args.out) / 'table.md').write_text(text + '\n')
    print(text)
    plot(results, Path(args.out) / f'{args.metric.rpartition("/")[2]}.png', args.metric)


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
