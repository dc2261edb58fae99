"""Train and test tiny detectors with every loss, and write which of them work together.

Example:
    python tools/analysis/compatibility.py --heads GFL TOOD --losses EQLv2Loss
    python tools/analysis/compatibility.py --jobs 2 --write docs/compatibility.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmdet_lt.engine import launch
from mmdet_lt.engine.compatibility.cell import losses
from mmdet_lt.engine.compatibility.families import FAMILIES
from mmdet_lt.engine.compatibility.matrix import broken_cells, markdown, page, run_matrix, select
from mmdet_lt.errors import InputError


def main(argv: list[str] | None = None) -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--heads', nargs='+', metavar='NAME', help='detectors; default: all')
    parser.add_argument('--losses', nargs='+', metavar='NAME', help='losses; default: all')
    parser.add_argument('--write', metavar='FILE', help='page to write; default: print the table')
    parser.add_argument('--jobs', type=int, default=1, help='processes')
    args = parser.parse_args(argv)
    if args.write and (args.heads or args.losses):
        raise InputError('`--write` writes the whole matrix: leave out `--heads` and `--losses`.')
    families = select(args.heads, FAMILIES, '--heads')
    names = select(args.losses, [cls.__name__ for cls in losses()], '--losses')
    matrix = run_matrix(families, names, args.jobs)
    broken = broken_cells(matrix)
    if broken:
        lines = '\n  '.join(broken)
        raise InputError(f'{len(broken)} cells neither work nor are refused:\n  {lines}')
    if args.write:
        Path(args.write).write_text(page(matrix, args.write))
    else:
        print('\n\n'.join(markdown(matrix)))


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
