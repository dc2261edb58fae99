"""Draw the Glyph-LVIS data set, or verify and reuse the one that is there.

Examples::

    python tools/dataset/make_glyph_lvis.py --preset mini --out data/glyph_lvis_mini
    python tools/dataset/make_glyph_lvis.py --preset full --out data/glyph_lvis --seed 0

Exit status: 0 done, 2 wrong input or no room to write, 130 interrupted (run again to continue).
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import NoReturn

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmdet_lt.datasets.glyph_lvis import PRESETS, generate_glyph_lvis
from mmdet_lt.errors import InputError


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'error: {message}; see --help.\n')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--preset', required=True, help=f'one of: {", ".join(PRESETS)}')
    parser.add_argument('--out', required=True, help='folder: new, empty or made with this tool')
    parser.add_argument('--seed', type=int, default=0, help='whole number of at least 0')
    parser.add_argument('--workers', type=int, help='drawing processes; default: every CPU core')
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns the exit status."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    try:
        out = generate_glyph_lvis(args.preset, args.out, args.seed, args.workers)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('interrupted; run the same command again to continue', file=sys.stderr)
        return 130
    print(f'Glyph-LVIS {args.preset}, seed {args.seed}: {out}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
