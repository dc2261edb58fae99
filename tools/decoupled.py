"""Train both stages of a decoupled recipe: representation first, then the classifier.

The work directory gets one folder for each stage. A finished stage is reused and an interrupted one
goes on, so the same command continues whatever was stopped. In place of the first config a
checkpoint may be named; then only the second stage is trained.
"""

from __future__ import annotations

import argparse
import copy
import gc
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

import torch
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config
from mmengine.dist import barrier
from mmengine.registry import init_default_scope

from mmdet_lt.engine import checkpoints, launch, work_dir
from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import file_digest, write_text_atomic


def get_parser() -> argparse.ArgumentParser:
    """Options of the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('stage1', help='config of the first stage, or a checkpoint (.pth) of it')
    parser.add_argument('stage2', help='config of the second stage')
    parser.add_argument('--work-dir', help='folder of both runs (default: work_dirs/<stage2>)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='change keys of both configs, written as for train.py',
    )
    parser.add_argument('--amp', action='store_true', help='train in mixed precision (GPU only)')
    parser.add_argument('--auto-scale-lr', action='store_true', help='as in train.py')
    parser.add_argument(
        '--overwrite', action='store_true', help='train both stages again, from scratch'
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='as train.py',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help='internal')
    return parser


def say(text: str) -> None:
    """Print on the first rank only, which is known before ranks have met."""
    if os.environ.get('RANK', os.environ.get('SLURM_PROCID', '0')) == '0':
        print(text, flush=True)


def train_tool() -> ModuleType:
    """``tools/train.py``, which trains each of the stages."""
    path = Path(__file__).with_name('train.py')
    spec = importlib.util.spec_from_file_location('mmdet_lt_train_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Stage:
    """One stage: its config as ``train.py`` would read it, its folder, what is there already.

    Args:
        number: 1 or 2.
        config: Config file.
        args: Arguments of the tool.
        load_from: Checkpoint to start from, empty for that of the config.
    """

    def __init__(
        self, number: int, config: str, args: argparse.Namespace, load_from: str = ''
    ) -> None:
        self.number, self.train = number, train_tool()
        self.folder = Path(args.work_dir) / f'stage{number}'
        options = [*args.cfg_options, *([f'load_from={load_from}'] if load_from else [])]
        words = [config, '--work-dir', str(self.folder), '--launcher', args.launcher]
        words += ['--local-rank', str(args.local_rank)]
        words += ['--amp'] * args.amp + ['--auto-scale-lr'] * args.auto_scale_lr
        if options:
            words += ['--cfg-options', *options]
        self.words, self.cfg = words, self._read(words)
        if (self.cfg.get('visualizer') or {}).get('name'):
            # A visualizer is found again by its name: that of stage 1 would go on drawing.
            name = f'visualizer.name=stage{number}'
            self.words = [*words, *([name] if options else ['--cfg-options', name])]
            self.cfg = self._read(self.words)

    def _read(self, words: list[str]) -> Config:
        return launch.load_config(launch.parse_arguments(self.train.get_parser(), words))

    def check_hooks(self) -> None:
        """Let the hooks that name parts of the model look at it now, not after stage 1.

        Raises:
            InputError: A name matches nothing.
        """
        init_default_scope(self.cfg.get('default_scope', 'mmdet'))
        configs = [c for c in self.cfg.get('custom_hooks') or [] if isinstance(c, dict)]
        hooks = [HOOKS.build(config) for config in copy.deepcopy(configs)]
        checking = [hook for hook in hooks if hasattr(hook, 'check_model')]
        model = MODELS.build(copy.deepcopy(self.cfg.model)) if checking else None
        for hook in checking:
            hook.check_model(model)

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint of the stage."""
        return work_dir.last_checkpoint(self.folder)

    @property
    def finished(self) -> bool:
        """Whether the last checkpoint is that of the last iteration.

        Raises:
            InputError: It was trained with another model or other classes, or cannot be read.
        """
        if self.checkpoint is None:
            return False
        work_dir.find_resume('auto', self.folder, self.cfg.to_dict())
        content = checkpoints.read_checkpoint(self.checkpoint, f'stage {self.number}')
        meta, loop = (content or {}).get('meta') or {}, self.cfg.train_cfg
        unit = 'epoch' if loop.get('max_epochs') else 'iter'
        return meta.get(unit, 0) >= loop[f'max_{unit}s']

    def check_source(self, source: str, overwrite: bool) -> None:
        """Remember the checkpoint this stage starts from; refuse to go on from another one.

        Raises:
            InputError: The folder holds a run that started from another checkpoint.
        """
        note, digest = self.folder / 'first_stage', file_digest(source)
        if self.checkpoint is None or overwrite:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text_atomic(note, digest)
        elif not note.is_file() or note.read_text(encoding='utf-8') != digest:
            raise InputError(
                f'{self.folder} holds {self.checkpoint.name}, which started from another first '
                f'stage than {source}: give another --work-dir, or --overwrite.'
            )

    def run(self, overwrite: bool) -> str:
        """Train what is missing.

        Returns:
            The checkpoint.

        Raises:
            InputError: ``train.py`` refuses, or no checkpoint was written.
        """
        if not overwrite and self.finished:
            say(f'Stage {self.number} is finished: {self.checkpoint}')
        else:
            start = ['--overwrite'] if overwrite else ['--resume'] if self.checkpoint else []
            say(f'Stage {self.number} of 2: {self.words[0]}')
            self.train.main([*self.words, *start])
            gc.collect()  # the detector of this stage makes room for the next
            torch.cuda.empty_cache()
            barrier()  # rank 0 writes the checkpoint
        if self.checkpoint is None:
            raise InputError(
                f'stage {self.number} wrote no checkpoint to {self.folder}: configure '
                f'`default_hooks.checkpoint` in {self.words[0]}.'
            )
        return str(self.checkpoint)


def check_order(first: Stage, second: Stage, overwrite: bool) -> None:
    """Refuse to train stage 1 again below a stage 2 that began from another one.

    Raises:
        InputError: Stage 2 has checkpoints although stage 1 is not finished.
    """
    if not overwrite and second.checkpoint is not None and not first.finished:
        raise InputError(
            f'{second.folder} holds {second.checkpoint.name}, but stage 1 in {first.folder} is not '
            'finished: the second stage began from another first one; delete the folder, give '
            'another --work-dir, or give --overwrite.'
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Train both stages."""
    args = get_parser().parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    args.work_dir = args.work_dir or os.path.join('work_dirs', Path(args.stage2).stem)
    if args.stage1.endswith('.pth'):
        checkpoints.check_checkpoint(args.stage1, 'argument stage1')
        source = os.path.abspath(args.stage1)
    else:
        first = Stage(1, args.stage1, args)
        second = Stage(2, args.stage2, args)
        second.check_hooks()
        check_order(first, second, args.overwrite)
        source = os.path.abspath(first.run(args.overwrite))
    second = Stage(2, args.stage2, args, load_from=source)
    second.check_source(source, args.overwrite)
    result = second.run(args.overwrite)
    say(f'Both stages are trained: {source} and {result}')


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
