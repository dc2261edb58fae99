"""Train a recipe of several stages by one command, each from the checkpoint of the one before.

Stages are finished, resumed or begun, whatever the work directory says; start the same command
again after an interruption. Class activation maps that a stage needs are extracted in between.

Example:
    python tools/train_stages.py STAGE1.py STAGE2.py --work-dir work_dirs/recipe
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
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmdet_lt.cam.gradcam import METHODS
from mmdet_lt.engine import launch
from mmdet_lt.engine.stages import load_stages, run_stages


def get_parser() -> argparse.ArgumentParser:
    """Options of the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='+', help='config of each stage, in order')
    parser.add_argument('--work-dir', required=True, help='folder; each stage gets stage<k> in it')
    parser.add_argument('--nproc', type=int, default=1, help='processes (GPUs) on this machine')
    parser.add_argument('--cam-method', default='hirescam', choices=METHODS)
    parser.add_argument(
        '--overwrite', action='store_true', help='begin stages of another recipe anew'
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train all stages."""
    args = get_parser().parse_args(argv)
    stages = load_stages(args.configs, args.work_dir)
    checkpoint = run_stages(stages, args.nproc, args.cam_method, args.overwrite)
    print(f'the recipe is finished: {checkpoint}')


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
