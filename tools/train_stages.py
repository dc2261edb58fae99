"""Train a recipe of several stages by one command, each from the checkpoint of the one before.

The work directory gets one folder for each stage. A finished stage is reused and an interrupted one
goes on, so the same command continues whatever was stopped. In place of the first config a
checkpoint may be named. Class activation maps that a stage needs are extracted in between.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

if __name__ == '__main__':
    # Loading the libraries takes seconds; until then an interrupt has nothing to tidy up.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # This clone goes first, and the folder of the tools is no place to import from.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmengine.config import Config
from mmengine.dist import get_rank

from mmdet_lt.cam.gradcam import METHODS
from mmdet_lt.engine import launch
from mmdet_lt.engine.stages import check_stages, load_stages, run_stages
from mmdet_lt.errors import InputError


def get_parser() -> argparse.ArgumentParser:
    """Options of the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'stages',
        nargs='+',
        metavar='STAGE',
        help='config of each stage, in order; the first may be a checkpoint (.pth)',
    )
    launch.add_common_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision (GPU only)')
    parser.add_argument('--auto-scale-lr', action='store_true', help='as in train.py')
    parser.add_argument(
        '--overwrite',
        action='store_true',
        help='train stages again whose folder holds a run of another config or checkpoint',
    )
    parser.add_argument(
        '--cam-method',
        default='hirescam',
        choices=METHODS,
        help='of the class activation maps between two stages (default hirescam)',
    )
    return parser


def train_tool() -> ModuleType:
    """``tools/train.py``, which trains each of the stages."""
    path = Path(__file__).with_name('train.py')
    spec = importlib.util.spec_from_file_location('mmdet_lt_train_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None) -> None:
    """Train all stages."""
    args = launch.parse_arguments(get_parser(), argv)
    tool = train_tool()
    options = args.cfg_options or {}
    if args.stages[0].endswith('.pth') and 'load_from' in options:
        raise InputError(
            '--cfg-options load_from says where the first stage starts, but the first stage is '
            f'the checkpoint {args.stages[0]}: leave one of them out.'
        )

    def read(path: str, folder: Path) -> Config:
        # Where a later stage starts is for the recipe to say.
        first = folder.name == 'stage1'
        own = {key: options[key] for key in options if first or key != 'load_from'}
        words = dict(vars(args), config=path, work_dir=str(folder), cfg_options=own)
        config = launch.load_config(argparse.Namespace(**words))
        tool.check(config, argparse.Namespace(**words))
        return config

    def train(config: Config, resume: bool) -> None:
        start = dict(resume='auto' if resume else None, overwrite=not resume)
        tool.train(config, argparse.Namespace(**start))

    name = Path(args.stages[-1]).stem
    stages = load_stages(args.stages, args.work_dir or os.path.join('work_dirs', name), read)
    check_stages(stages, args.cam_method)
    result = run_stages(stages, train, args.cam_method, args.overwrite)
    if get_rank() == 0:
        print(f'All stages are trained: {result}')


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
