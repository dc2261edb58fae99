"""Train several configs for the same number of iterations and compare them.

Every run has a folder of its own below ``out/<label>/seed<k>`` with the final config, the log, the
checkpoint, ``result.json`` and ``lvis_detail.json``. A finished run is reused, an interrupted one
goes on from its last checkpoint, and that of another config is refused. A run that
fails is reported as failed; the others go on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from tqdm import tqdm

from mmdet_lt.engine._compare_folder import (
    alone,
    check_folder,
    evaluations,
    fingerprint,
    read_small,
    start_options,
)
from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import write_text_atomic
from mmdet_lt.utils.logs import read_scalars


@dataclass(frozen=True)
class Run:
    """One training: a config, a seed, a number of iterations and where its files go."""

    label: str
    config: Path
    seed: int
    iters: int | None
    folder: Path


def set_iterations(cfg: Config, iters: int) -> None:
    """Make a config train exactly ``iters`` iterations with its schedule scaled to that length.

    Iteration schedules are stretched or shortened, epoch schedules are turned into iteration
    schedules in which an epoch is ``iters / max_epochs`` iterations; warm-ups that count iterations
    keep their length.
    """
    train = cfg.train_cfg
    length = train.get('max_iters') or train.get('max_epochs')
    if not length or iters < 1:
        raise InputError(
            f'`--iters` must be at least 1 (found {iters}) and `train_cfg` must have `max_iters` '
            'or `max_epochs`.'
        )
    scale = iters / length
    by_epoch = 'max_iters' not in train
    cfg.train_cfg = dict(type='mmdet_lt.IterBasedTrainLoop', max_iters=iters, val_interval=iters)
    schedulers = cfg.get('param_scheduler') or []
    for entry in schedulers if isinstance(schedulers, list) else [schedulers]:
        counts_epochs = entry.get('by_epoch', True)
        if counts_epochs == by_epoch:
            for key in ('begin', 'end', 'T_max', 'milestones', 'step_size'):
                if isinstance(entry.get(key), (int, float)):
                    entry[key] = round(entry[key] * scale)
                elif entry.get(key):
                    entry[key] = [round(value * scale) for value in entry[key]]
        entry.by_epoch = False
        entry.pop('convert_to_iter_based', None)
    hooks = cfg.get('default_hooks') or {}
    saving = dict(hooks.get('checkpoint') or {}, type='CheckpointHook')
    saving.update(by_epoch=False, interval=max(iters // 4, 1), max_keep_ckpts=1)
    cfg.default_hooks = dict(hooks, checkpoint=saving)
    cfg.log_processor = dict(type='LogProcessor', window_size=25, by_epoch=False)


def final_config(run: Run) -> tuple[str, str, int]:
    """Text of the config that a run trains with, fingerprint of what decides its result, length."""
    cfg = read_config(run.label, run.config)
    if run.iters is not None:
        set_iterations(cfg, run.iters)
    elif 'max_iters' not in cfg.train_cfg:
        raise InputError(
            f'{run.config} counts epochs: give `--iters`, since methods are compared at an equal '
            'number of iterations.'
        )
    cfg.randomness = dict(seed=run.seed)
    evaluator = cfg.get('val_evaluator')
    if isinstance(evaluator, dict) and str(evaluator.get('type')).endswith('LVISMetric'):
        evaluator.detail_file = str(run.folder / 'lvis_detail.json')
    cfg.work_dir = str(run.folder)
    mark = fingerprint(cfg.pretty_text)
    # One evaluation, at the end; a run that is killed in it goes on from the checkpoint before the
    # last.
    cfg.train_cfg.val_interval = cfg.train_cfg.max_iters
    saving = (cfg.get('default_hooks') or {}).get('checkpoint')
    if saving and saving.get('max_keep_ckpts') == 1:
        saving.max_keep_ckpts = 2
    return cfg.pretty_text, mark, int(cfg.train_cfg.max_iters)


def read_config(label: str, path: str | os.PathLike) -> Config:
    """Read a config file.

    Raises:
        InputError: The file does not exist, cannot be read or trains nothing.
    """
    if not Path(path).is_file():
        raise InputError(f'config file {path} of {label!r} does not exist.')
    try:
        cfg = Config.fromfile(str(path))
    except Exception as error:  # a config is a program: anything can go wrong in it
        raise InputError(f'config file {path} of {label!r} cannot be read: {error}') from error
    if not cfg.get('train_cfg'):
        raise InputError(f'config file {path} of {label!r}: key `train_cfg` expected, found none.')
    return cfg


def execute(run: Run, bar: tqdm | None = None, threads: int | None = None) -> dict[str, Any]:
    """Train and evaluate one run, or reuse it; returns its ``result.json``.

    Raises:
        InputError: The folder holds a run of another config, or the training failed; the end of
            its log is in the message.
    """
    text, mark, iters = final_config(run)
    check_folder(run.folder, run.config, mark, overwrite=False)
    run.folder.mkdir(parents=True, exist_ok=True)
    with alone(run.folder, bar.write if bar is not None else print) as lock:
        return _execute_alone(run, text, mark, iters, bar, threads, lock)


def _execute_alone(
    run: Run,
    text: str,
    mark: str,
    iters: int,
    bar: tqdm | None,
    threads: int | None,
    lock: int,
) -> dict[str, Any]:
    config, result_file = run.folder / 'config.py', run.folder / 'result.json'
    result = read_small(result_file)
    if result:
        if bar is not None:
            bar.update(result['iters'] - bar.n)
        return result
    write_text_atomic(config, text)
    started = run.folder / 'started.json'
    earlier = read_small(started)
    spent = earlier.get('seconds', 0.0)
    write_text_atomic(started, json.dumps(dict(fingerprint=mark, seconds=spent)))
    tool = Path(__file__).resolve().parents[2] / 'tools' / 'train.py'
    start = start_options(run.folder, iters) if earlier else ['--overwrite']
    command = [sys.executable, str(tool), str(config), '--work-dir', str(run.folder), *start]
    env = dict(os.environ, PYTHONWARNINGS='ignore')
    if threads:
        env['OMP_NUM_THREADS'] = str(threads)
    began = time.time()
    log = run.folder / 'train.log'
    with open(log, 'w', encoding='utf-8') as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, pass_fds=[lock]
        )
        try:
            while process.poll() is None:
                time.sleep(1.0)
                if bar is not None:
                    steps = [line['step'] for line in read_scalars(run.folder) if 'loss' in line]
                    bar.update(max(steps[-1] - bar.n, 0) if steps else 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        finally:
            spent += time.time() - began
            write_text_atomic(started, json.dumps(dict(fingerprint=mark, seconds=spent)))
    if process.returncode:
        tail = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
        raise InputError(
            f'training {run.label!r} (seed {run.seed}) stopped with status {process.returncode}: '
            f'{tail[-1] if tail else "no output"} (log: {log}).'
        )
    logged = read_scalars(run.folder)
    evaluated = evaluations(logged)
    if not evaluated:
        raise InputError(
            f'training {run.label!r} (seed {run.seed}) ended without a metric: `val_evaluator` and '
            f'`val_dataloader` must be set in {run.config} (log: {log}).'
        )
    result = dict(
        label=run.label,
        config=str(run.config),
        seed=run.seed,
        iters=iters,
        seconds=round(spent, 1),
        iteration_seconds=_median_iteration(logged),
        fingerprint=mark,
        **{key: value for key, value in evaluated[-1].items() if '/' in key},
    )
    write_text_atomic(result_file, json.dumps(result, indent=1) + '\n')
    if bar is not None:
        bar.update(result['iters'] - bar.n)
    return result


def _median_iteration(logged: list[dict[str, Any]]) -> float:
    times = [line['time'] for line in logged if 'time' in line and 'loss' in line]
    return round(float(np.median(times)), 4) if times else float('nan')


def compare(
    configs: dict[str, str | os.PathLike],
    out: str | os.PathLike,
    seeds: Sequence[int] = (0,),
    iters: int | None = None,
    jobs: int = 1,
    progress: bool = True,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Run every config with every seed.

    Args:
        configs: Label to config file.
        out: Folder of all runs.
        seeds: Seeds.
        iters: Iterations of every run; by default each config's own, which must be equal.
        jobs: Trainings side by side; each gets its share of the cores.
        progress: Show progress bars.
        overwrite: Delete runs of other configs below ``out`` that are in the way.

    Returns:
        One result for each run, seeds innermost; that of a failed run has the key ``failed`` with
        the message in place of metrics.

    Raises:
        InputError: A config does not exist or cannot be read, lengths differ, a folder holds a
            run of another config, or every run failed.
    """
    if not seeds:
        raise InputError('`--seeds` must be at least 1, found none.')
    if jobs < 1:
        raise InputError(f'`--jobs` must be at least 1, found {jobs}.')
    lengths = {}
    for label, path in configs.items():
        cfg = read_config(label, path)
        lengths[label] = cfg.train_cfg.get('max_iters') if iters is None else iters
    if len(set(lengths.values())) > 1:
        raise InputError(f'runs must be equally long, found {lengths}: give `--iters`.')
    runs = [
        Run(label, Path(path).resolve(), seed, iters, Path(out).resolve() / label / f'seed{seed}')
        for label, path in configs.items()
        for seed in seeds
    ]
    for run in runs:  # before anything is trained
        check_folder(run.folder, run.config, final_config(run)[1], overwrite)
    threads = max((os.cpu_count() or 1) // jobs, 1) if jobs > 1 else None

    def work(item: tuple[int, Run]) -> dict[str, Any]:
        position, run = item
        with tqdm(
            total=lengths[run.label],
            desc=f'{run.label}, seed {run.seed}',
            unit='it',
            position=position if jobs > 1 else 0,
            disable=not progress,
            dynamic_ncols=True,
        ) as bar:
            try:
                return execute(run, bar, threads)
            except InputError as error:
                bar.write(f'failed: {error}')
                facts = dict(label=run.label, config=str(run.config), seed=run.seed)
                return dict(facts, iters=lengths[run.label], failed=str(error))

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        results = list(pool.map(work, enumerate(runs)))
    if results and all('failed' in result for result in results):
        raise InputError(results[0]['failed'])
    return results
