"""Train several configs for the same number of iterations and compare them.

Every run has a folder of its own below ``out/<label>/seed<k>`` with the final config, the log, the
checkpoint, ``result.json`` and ``lvis_detail.json``. A finished run is reused, an interrupted one
goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
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

from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import write_text_atomic
from mmdet_lt.utils.logs import read_scalars

#: Columns of the table: header, key of the metric, factor.
COLUMNS = (
    ('AP', 'bbox_AP', 100),
    ('AP50', 'bbox_AP50', 100),
    ('APr', 'bbox_APr', 100),
    ('APc', 'bbox_APc', 100),
    ('APf', 'bbox_APf', 100),
    ('seconds', 'seconds', 1),
)


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


def prepare(run: Run) -> Path:
    """Write the run's final config and return its path."""
    cfg = Config.fromfile(str(run.config))
    if run.iters is not None:
        set_iterations(cfg, run.iters)
    elif 'max_iters' not in cfg.train_cfg:
        raise InputError(
            f'{run.config} counts epochs: give `--iters`, since methods are compared at an equal '
            'number of iterations.'
        )
    cfg.randomness = dict(seed=run.seed)
    evaluator = cfg.val_evaluator
    if isinstance(evaluator, dict) and str(evaluator.get('type')).endswith('LVISMetric'):
        evaluator.detail_file = str(run.folder / 'lvis_detail.json')
    cfg.work_dir = str(run.folder)
    path = run.folder / 'config.py'
    write_text_atomic(path, cfg.pretty_text)
    return path


def _fingerprint(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()


def execute(run: Run, bar: tqdm | None = None, threads: int | None = None) -> dict[str, Any]:
    """Train and evaluate one run, or reuse it; returns its ``result.json``.

    Raises:
        InputError: The training failed; the end of its log is in the message.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    result_file = run.folder / 'result.json'
    config = prepare(run)
    mark = _fingerprint(config)
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        if result.get('fingerprint') == mark:
            if bar is not None:
                bar.update(result['iters'] - bar.n)
            return result
        result_file.unlink()
    started = run.folder / 'started.json'
    earlier = json.loads(started.read_text()) if started.is_file() else {}
    same = earlier.get('fingerprint') == mark
    spent = earlier.get('seconds', 0.0) if same else 0.0
    write_text_atomic(started, json.dumps(dict(fingerprint=mark, seconds=spent)))
    tool = Path(__file__).resolve().parents[2] / 'tools' / 'train.py'
    start_flag = '--resume' if same else '--overwrite'
    command = [sys.executable, str(tool), str(config), '--work-dir', str(run.folder), start_flag]
    env = dict(os.environ, PYTHONWARNINGS='ignore')
    if threads:
        env['OMP_NUM_THREADS'] = str(threads)
    began = time.time()
    log = run.folder / 'train.log'
    with open(log, 'w', encoding='utf-8') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
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
    metrics = next(line for line in reversed(logged) if any(k.startswith('lvis/') for k in line))
    result = dict(
        label=run.label,
        config=str(run.config),
        seed=run.seed,
        iters=int(Config.fromfile(str(config)).train_cfg.max_iters),
        seconds=round(spent, 1),
        iteration_seconds=_median_iteration(logged),
        fingerprint=mark,
        **{key: value for key, value in metrics.items() if key.startswith('lvis/')},
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
) -> list[dict[str, Any]]:
    """Run every config with every seed.

    Args:
        configs: Label to config file.
        out: Folder of all runs.
        seeds: Seeds.
        iters: Iterations of every run; by default each config's own, which must be equal.
        jobs: Trainings side by side; each gets its share of the cores.

    Returns:
        One result for each run, seeds innermost.
    """
    lengths = {}
    for label, path in configs.items():
        if not Path(path).is_file():
            raise InputError(f'config file {path} of {label!r} does not exist.')
        lengths[label] = iters or Config.fromfile(str(path)).train_cfg.get('max_iters')
    if len(set(lengths.values())) > 1:
        raise InputError(f'runs must be equally long, found {lengths}: give `--iters`.')
    runs = [
        Run(label, Path(path).resolve(), seed, iters, Path(out).resolve() / label / f'seed{seed}')
        for label, path in configs.items()
        for seed in seeds
    ]
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
            return execute(run, bar, threads)

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(work, enumerate(runs)))


def metric(result: dict[str, Any], key: str) -> float:
    """One value of a result, whatever prefix the metric has."""
    return float(result[key] if key in result else result[f'lvis/{key}'])


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table, mean ± standard deviation over seeds."""
    labels = list(dict.fromkeys(result['label'] for result in results))
    rows = [['recipe', 'iterations', 'seeds', *(name for name, _, _ in COLUMNS)]]
    for label in labels:
        mine = [result for result in results if result['label'] == label]
        row = [label, str(mine[0]['iters']), str(len(mine))]
        for name, key, factor in COLUMNS:
            values = np.array([metric(result, key) * factor for result in mine])
            digits = 0 if name == 'seconds' else 1
            text = f'{values.mean():.{digits}f}'
            if len(values) > 1:
                text += f' ± {values.std(ddof=1):.{digits}f}'
            row.append(text)
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        '| ' + ' | '.join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + ' |' for r in rows
    ]
    rule = '|' + '|'.join('-' * (w + 2) for w in widths) + '|'
    return '\n'.join([lines[0], rule, *lines[1:]])
