"""Train a detector: MMDetection's options, plus protection of the results of earlier runs."""

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
    # This clone goes first, and the folder of the tools is no place to import from.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmengine.config import Config

from mmdet_lt.engine import checkpoints, cpu_distributed, launch, work_dir
from mmdet_lt.engine.data_check import check_data_files
from mmdet_lt.errors import InputError


def get_parser() -> argparse.ArgumentParser:
    """Options of the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    launch.add_common_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='train in mixed precision (GPU only)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by batch size / auto_scale_lr.base_batch_size',
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from a checkpoint, without a name from the last one in the work directory',
    )
    start.add_argument(
        '--overwrite',
        action='store_true',
        help='start from scratch in a work directory that holds checkpoints already',
    )
    return parser


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Write ``--amp`` and ``--auto-scale-lr`` into the config.

    Raises:
        InputError: The config or the machine cannot follow an option.
    """
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not cfg.get(key):
            raise InputError(f'config file {args.config}: key `{key}` expected, found none.')
    if args.amp:
        kind = launch.type_name(cfg.optim_wrapper)
        if kind not in ('', 'OptimWrapper', 'AmpOptimWrapper'):
            raise InputError(f'--amp expects optim_wrapper.type OptimWrapper, found {kind}.')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    launch.require_accelerator(cfg, '--amp' if args.amp else 'optim_wrapper.type')
    if args.auto_scale_lr:
        for key in ('enable', 'base_batch_size'):
            if key not in (cfg.get('auto_scale_lr') or {}):
                raise InputError(
                    f'--auto-scale-lr expects `auto_scale_lr.{key}` in {args.config}, found none.'
                )
        cfg.auto_scale_lr.enable = True


def choose_start(cfg: Config, args: argparse.Namespace) -> None:
    """Set ``resume`` and ``load_from``, and refuse to damage an earlier run.

    Raises:
        InputError: The work directory or the checkpoint does not fit.
    """
    resume = args.resume
    if resume is None and cfg.get('resume') and not args.overwrite:
        resume = cfg.get('load_from') or 'auto'
    cfg.resume = False
    if resume is not None:
        checkpoint = work_dir.find_resume(resume, cfg.work_dir, cfg.to_dict())
        if checkpoint is not None:
            cfg.resume, cfg.load_from = True, checkpoint
            return
    elif args.overwrite:
        work_dir.forget_earlier_run(cfg.work_dir)
    else:
        work_dir.check_new_run(cfg.work_dir, cfg.to_dict())
    if cfg.get('load_from'):
        checkpoints.check_checkpoint(cfg.load_from, 'load_from')


def check(cfg: Config, args: argparse.Namespace) -> None:
    """Write the options into the config and look at launcher and data files.

    Raises:
        InputError: The config or the machine cannot follow, or a file is missing.
    """
    cpu_distributed.check_launcher(args.launcher)
    apply_options(cfg, args)
    check_data_files(cfg, ('train', 'val') if cfg.get('val_cfg') else ('train',))


def train(cfg: Config, args: argparse.Namespace) -> None:
    """Train a checked config; of the arguments, ``resume`` and ``overwrite`` count."""
    choose_start(cfg, args)
    launch.build_runner(cfg).train()


def main(argv: Sequence[str] | None = None) -> None:
    """Train."""
    args = launch.parse_arguments(get_parser(), argv)
    cfg = launch.load_config(args)
    check(cfg, args)
    train(cfg, args)


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
