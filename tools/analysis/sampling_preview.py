"""Show what the sampler of a config will do, before training: classes, groups, repeats, a figure.

Prints images and instances for each frequency group and class, with each image once ("before"), in
expectation and in one drawn epoch, the share of repeats and the most repeated images. Writes
sampling.png and sampling.csv.

Example:
    python tools/analysis/sampling_preview.py CONFIG --out preview
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmdet_lt.engine import launch
from mmdet_lt.engine.data_check import check_data_files
from mmdet_lt.engine.loops.positions import loader_sampler
from mmdet_lt.errors import InputError
from mmdet_lt.statistics import ClassStatistics
from mmdet_lt.utils.files import write_text_atomic
from mmdet_lt.visualization import sampling


def get_parser() -> argparse.ArgumentParser:
    """Options of the tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--out', help='folder for sampling.png and sampling.csv')
    parser.add_argument('--epoch', type=int, default=0, help='epoch to look at, from 0')
    parser.add_argument('--classes', type=int, default=60, help='classes to print, rarest first')
    launch.add_common_arguments(parser)
    return parser


def build_sampler(cfg: Config) -> Any:
    """The training sampler as the runner of this config would build it, on one process.

    Raises:
        InputError: The config has no training data or no sampler.
    """
    loader = cfg.get('train_dataloader')
    if not loader or not loader.get('dataset') or not loader.get('sampler'):
        raise InputError(
            'the preview needs `train_dataloader` with `dataset` and `sampler` in the config, '
            'found none.'
        )
    init_default_scope(cfg.get('default_scope') or 'mmdet')
    # Workers only start when the loader is iterated, which does not happen here.
    seed = (cfg.get('randomness') or {}).get('seed')
    return loader_sampler(Runner.build_dataloader(loader, seed=0 if seed is None else seed))


def statistics_of(cfg: Config, dataset: Any) -> ClassStatistics:
    """Counts of the data set, with the thresholds of the config's ClassStatisticsHook."""
    for hook in cfg.get('custom_hooks') or ():
        if launch.type_name(hook) == 'ClassStatisticsHook' and hook.get('thresholds'):
            return ClassStatistics.from_dataset(dataset, tuple(hook['thresholds']))
    return ClassStatistics.from_dataset(dataset)


def main(argv: list[str] | None = None) -> None:
    """Print and plot."""
    args = launch.parse_arguments(get_parser(), argv)
    if args.epoch < 0:
        raise InputError(f'--epoch counts from 0, found {args.epoch}.')
    cfg = launch.load_config(args)
    check_data_files(cfg, ('train',))
    sampler = build_sampler(cfg)
    summary = sampling.summarise(sampler, statistics_of(cfg, sampler.dataset), args.epoch)
    name, draws = type(sampler).__name__, int(summary.draws['drawn'].sum())
    print(
        f'{name}, seed {sampler.seed}, epoch {args.epoch}: {draws:,} draws from '
        f'{len(sampler.dataset):,} images ({draws / len(sampler.dataset):.2f} x)\n'
    )
    print(f'{sampling.group_table(summary)}\n\n{sampling.class_table(summary, args.classes)}\n')
    print(f'{sampling.repeat_lines(summary, sampler.dataset)}\n')
    out = Path(args.out or Path(cfg.work_dir) / 'sampling_preview')
    out.mkdir(parents=True, exist_ok=True)
    title = f'{name}: {Path(args.config).stem}'
    sampling.sampling_figure(summary, title).savefig(out / 'sampling.png', dpi=150)
    write_text_atomic(out / 'sampling.csv', sampling.class_csv(summary))
    print(f'{out / "sampling.png"}\n{out / "sampling.csv"}')


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
