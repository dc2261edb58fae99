"""Show objects, their activation maps, masks and pasted results on one sheet.

Examples:
    python tools/cam/browse.py CONFIG --cams work_dirs/cams/train.cams \
        --checkpoint CHECKPOINT --out sheet.png
    python tools/cam/browse.py CONFIG --mask-source mask --out sheet.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmengine.config import DictAction

from mmdet_lt.cam.browse import draw_sheet
from mmdet_lt.datasets._paste_bank import MASK_SOURCES
from mmdet_lt.engine import checkpoints, launch
from mmdet_lt.engine.data_check import check_data_files
from mmdet_lt.errors import InputError


def get_parser() -> argparse.ArgumentParser:
    """Options of the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--cams', help='CAM file')
    parser.add_argument('--checkpoint', help='checkpoint of the CAMs: draws the maps themselves')
    parser.add_argument('--mask-source', choices=MASK_SOURCES, default='cam')
    parser.add_argument('--out', required=True, help='picture to write, .png or .jpg')
    parser.add_argument('--num', type=int, default=12, help='objects (default 12)')
    parser.add_argument('--pastes', type=int, default=3, help='pasted results each (default 3)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    parser.set_defaults(launcher='none', work_dir=None, local_rank=0)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Draw."""
    args = launch.parse_arguments(get_parser(), argv)
    cfg = launch.load_config(args)
    if Path(args.out).suffix.lower() not in ('.png', '.jpg', '.jpeg'):
        raise InputError(f'--out expects a name ending in .png or .jpg, found {args.out}.')
    if args.checkpoint is not None:
        checkpoints.check_checkpoint(args.checkpoint, '--checkpoint')
    check_data_files(cfg, ('train',))
    path = draw_sheet(
        cfg,
        args.out,
        args.cams,
        args.checkpoint,
        args.mask_source,
        args.num,
        args.pastes,
        args.seed,
    )
    print(f'{path} ({path.stat().st_size / 1e6:.1f} MB)')


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
