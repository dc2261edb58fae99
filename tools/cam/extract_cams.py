"""Store foreground masks of all training objects, found by class activation maps of a detector.

Examples:
    python tools/cam/extract_cams.py CONFIG CHECKPOINT --out work_dirs/cams
    python tools/torchrun.py --nproc_per_node=8 tools/cam/extract_cams.py CONFIG CHECKPOINT \
        --out work_dirs/cams --launcher pytorch

A killed run continues where it was when it is started again, with any number of processes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == '__main__':
    # Loading the libraries takes seconds; until then an interrupt has nothing to tidy up.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from mmdet_lt.cam.extract import extract_cams
from mmdet_lt.cam.gradcam import METHODS
from mmdet_lt.engine import checkpoints, cpu_distributed, launch
from mmdet_lt.engine.data_check import check_data_files
from mmdet_lt.errors import InputError


def get_parser() -> argparse.ArgumentParser:
    """Options of the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file of the trained detector')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument(
        '--out', required=True, help='a .cams file, or a folder for one named as the annotations'
    )
    parser.add_argument(
        '--method',
        default='gradcam',
        choices=METHODS,
        help='hirescam suits box heads with fully connected layers better (docs/cam_sampling.md)',
    )
    parser.add_argument('--batch-size', type=int, default=8, help='images at once (default 8)')
    parser.add_argument(
        '--threshold',
        type=float,
        default=1.0,
        help='foreground is what reaches this multiple of the mean of a map (default 1)',
    )
    parser.add_argument('--num-workers', type=int, help='loading processes; default as in training')
    launch.add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Extract."""
    args = launch.parse_arguments(get_parser(), argv)
    cfg = launch.load_config(args)
    cpu_distributed.check_launcher(args.launcher)
    if checkpoints.is_remote(args.checkpoint):
        raise InputError(
            f'argument checkpoint should be a local file, found {args.checkpoint}: CAMs are tied '
            'to its content, so fetch it first.'
        )
    checkpoints.check_checkpoint(args.checkpoint, 'argument checkpoint')
    check_data_files(cfg, ('train',))
    if args.launcher != 'none':
        # Ranks exchange a plan and wait for each other, nothing more: gloo does on every machine.
        cpu_distributed.init_cpu_group(cfg)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    path = extract_cams(
        cfg,
        args.checkpoint,
        args.out,
        args.batch_size,
        args.threshold,
        args.num_workers,
        args.method,
    )
    if os.environ.get('RANK', '0') == '0':
        print(f'{path} ({path.stat().st_size / 1e6:.1f} MB)')


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
