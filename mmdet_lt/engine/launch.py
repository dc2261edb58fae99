"""What ``tools/train.py`` and ``tools/test.py`` share: arguments, config, runner, errors."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from torch import distributed

from mmdet_lt.engine import cpu_distributed
from mmdet_lt.errors import InputError

_interrupted = False


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share; names and meaning are MMDetection's."""
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and results')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change keys of the config: a.b=1 c="[1,2]" d="[(1,2),(3,4)]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='who started the processes of a distributed run',
    )
    # torch.distributed.launch gives this option, torchrun the variable LOCAL_RANK instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='internal')


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line and publish the local rank.

    Raises:
        InputError: ``--cfg-options`` is not made of ``key=value``.
    """
    try:
        args = parser.parse_args(argv)
    except ValueError as error:  # DictAction does not report through argparse
        raise InputError(f'--cfg-options expects key=value pairs: {error}.') from error
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def load_config(args: argparse.Namespace) -> Config:
    """Read the config file and apply ``--cfg-options``, ``--launcher`` and ``--work-dir``.

    Raises:
        InputError: The file is missing or broken, or an option does not fit it.
    """
    path = Path(args.config)
    if not path.is_file():
        found = 'a folder' if path.is_dir() else 'nothing'
        raise InputError(f'config file {path} expected, found {found} there.')
    try:
        cfg = Config.fromfile(str(path))
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise InputError(f'config file {path} cannot be read: {one_line(error)}') from error
    if args.cfg_options:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except (KeyError, TypeError, AssertionError, IndexError) as error:
            raise InputError(f'--cfg-options does not fit {path}: {one_line(error)}') from error
    if not cfg.get('model'):
        raise InputError(f'config file {path}: key `model` expected, found none.')
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = os.path.join('.', 'work_dirs', path.stem)
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config; on a machine without accelerator also a distributed one.

    Raises:
        InputError: The environment of the launcher is missing or does not fit the machine.
    """
    from mmdet.registry import RUNNERS

    kind = cfg.get('runner_type', 'Runner')
    cls = Runner if kind == 'Runner' else RUNNERS.get(kind)
    if cls is None:
        raise InputError(f'`runner_type` names a registered runner, found {kind!r}.')
    if cfg.launcher != 'none' and cpu_distributed.on_cpu():
        cls = cpu_distributed.cpu_runner(cls)
        cpu_distributed.init_cpu_group(cfg)
    return cls.from_cfg(cfg)


def require_accelerator(cfg: Config, key: str) -> None:
    """Refuse mixed precision where mmengine's AmpOptimWrapper cannot work.

    Raises:
        InputError: This process trains on a CPU.
    """
    mixed = type_name(cfg.get('optim_wrapper') or {}) == 'AmpOptimWrapper'
    if mixed and cpu_distributed.on_cpu():
        raise InputError(
            f'{key} asks for mixed precision (AmpOptimWrapper), which needs a GPU, and none is '
            'visible here: train in full precision, or make a GPU visible.'
        )


def type_name(config: Mapping[str, Any]) -> str:
    """Name of the class in a config's ``type``: a string, perhaps scoped, or a class."""
    kind = config.get('type', '')
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def run_cli(main: Callable[[Sequence[str] | None], Any], argv: Sequence[str] | None = None) -> int:
    """Run a tool and turn what a user did wrong into one sentence.

    Wrong input prints ``error: ...`` and gives 2, an interrupt gives 130; other exceptions are
    bugs and pass through. ``MMDET_LT_TRACEBACK=1`` shows the trace of wrong input too.

    Args:
        main: The tool.
        argv: Its arguments, those of the process by default.

    Returns:
        Status for ``sys.exit``.
    """
    global _interrupted
    _interrupted = False
    # A shell starts background jobs with SIGINT ignored; an explicit `kill -INT` should work there
    # too, as it does under torchrun.
    previous = signal.signal(signal.SIGINT, _on_interrupt)
    try:
        main(argv)
        status = 0
    except (InputError, FileNotFoundError, pickle.UnpicklingError) as error:
        status = 130 if _interrupted else _report(error)
    except BaseException as error:
        # A rank that waits for another one, or for a data worker, sees the interrupt as a broken
        # connection first.
        if _interrupted or isinstance(error, KeyboardInterrupt):
            status = 130
        elif _is_unknown_type(error):
            status = _report(error)
        elif _is_empty_dataset(error):
            status = _report(InputError(_EMPTY))
        else:
            raise
    finally:
        signal.signal(signal.SIGINT, previous)
    if status == 130 and _is_first_rank():
        print('interrupted', file=sys.stderr)
    elif status == 0 and distributed.is_initialized() and distributed.get_backend() == 'gloo':
        _leave_gloo()
    return status


def _leave_gloo() -> NoReturn:
    """End a finished rank without tearing gloo down.

    Its threads may still be busy with the last collective; destroying the group, or the tear-down
    of the interpreter, then aborts the process now and then ("terminate called without an active
    exception") although everything is done and written.
    """
    distributed.barrier()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _on_interrupt(signum: int, frame: Any) -> None:
    global _interrupted
    if _interrupted:  # the second time means now
        os._exit(130)
    _interrupted = True
    raise KeyboardInterrupt


def _is_unknown_type(error: BaseException) -> bool:
    """Whether a registry of mmengine does not know a ``type`` of the config."""
    return (
        isinstance(error, KeyError)
        and re.search(r'is not in the \S+ registry', str(error)) is not None
    )


_EMPTY = (
    'a data set of the config has no usable image: the class names in `metainfo.classes` (or the '
    'defaults of its type) must be names of `categories` in `ann_file`, and `filter_cfg` must '
    'leave some images.'
)


def _is_empty_dataset(error: BaseException) -> bool:
    """Whether MMEngine failed to store an empty list of records, as COCO defaults on other data."""
    return isinstance(error, ValueError) and 'need at least one array to concatenate' in str(error)


def _is_first_rank() -> bool:
    names = ('LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK')
    return all(os.environ.get(name, '0') == '0' for name in names)


def _report(error: BaseException) -> int:
    if not _is_first_rank():
        # Mostly all ranks fail alike: let the first one speak and the launcher end the others. On
        # a busy machine the first one may come some seconds later.
        time.sleep(15)
    if os.environ.get('MMDET_LT_TRACEBACK', '') not in ('', '0'):
        traceback.print_exception(error)
    print(f'error: {one_line(error)}', file=sys.stderr, flush=True)
    return 2


def one_line(error: BaseException) -> str:
    """The message of an exception in one line, with its kind where the message needs it."""
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f'file {error.filename} expected, found nothing there.'
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r'\x1b\[[0-9;]*m', '', ' '.join(str(text).split()))
    # A data worker hands its whole trace over as text.
    text = re.sub(r'^Caught InputError in .* mmdet_lt\.errors\.InputError: ', '', text)
    # Registries put the chain of classes being built in front of the sentence.
    text = re.sub(r'^(class `\w+` in \S+\.py: )+', '', text)
    if isinstance(error, InputError | FileNotFoundError | SyntaxError) and text:
        return text
    return f'{type(error).__name__}: {text}'
