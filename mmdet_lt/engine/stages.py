"""Train several configs one after another, each from the checkpoint of the one before.

Every stage has a folder of its own, ``<work_dir>/stage<k>``. A finished stage is kept, a killed one
goes on from its last checkpoint. Where a stage pastes by class activation maps
(:class:`mmdet_lt.CAMSampler` without ``cams``), they are extracted with the stage before it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from mmdet_lt.engine.work_dir import last_checkpoint
from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import file_digest, write_text_atomic

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


@dataclass
class Stage:
    """One training of a recipe."""

    number: int
    config: Config
    folder: Path

    @property
    def cams(self) -> Path:
        """Where the class activation maps of this stage's detector go."""
        return self.folder / 'stage.cams'

    def sampler(self) -> dict[str, Any]:
        """Config of the training sampler."""
        return self.config.train_dataloader.get('sampler') or {}

    def wants_cams(self) -> bool:
        """Whether the stage pastes by maps that its config does not name."""
        sampler = self.sampler()
        by_cam = sampler.get('mask_source', 'cam') == 'cam' and not sampler.get('cams')
        return str(sampler.get('type', '')).split('.')[-1] == 'CAMSampler' and by_cam


def load_stages(configs: Sequence[str | Path], work_dir: str | Path) -> list[Stage]:
    """Read the configs.

    Raises:
        InputError: Fewer than two stages, a missing file, or maps asked for in the first stage.
    """
    if len(configs) < 2:
        raise InputError(
            f'a recipe has at least two stages, found {len(configs)}: give each config.'
        )
    stages = []
    for number, path in enumerate(configs, 1):
        if not Path(path).is_file():
            raise InputError(f'config file {path} of stage {number} does not exist.')
        folder = Path(work_dir).resolve() / f'stage{number}'
        stages.append(Stage(number, Config.fromfile(str(path)), folder))
    if stages[0].wants_cams():
        raise InputError(
            f'stage 1 ({configs[0]}) pastes by class activation maps, which the stage before would '
            'make: give `train_dataloader.sampler.cams`, or a stage before it.'
        )
    return stages


def run_stages(
    stages: Sequence[Stage], nproc: int = 1, cam_method: str = 'hirescam', overwrite: bool = False
) -> Path:
    """Train all stages; returns the last checkpoint.

    Args:
        stages: From :func:`load_stages`.
        nproc: Processes on this machine, as ``tools/dist_train.sh`` starts them.
        cam_method: Method of ``tools/cam/extract_cams.py``.
        overwrite: Start stages again that were begun with other settings.

    Raises:
        InputError: A stage failed, or its folder holds a run with other settings.
    """
    before: Stage | None = None
    checkpoint: Path | None = None
    for stage in stages:
        if before is not None:
            if not stage.config.get('load_from'):
                stage.config.load_from = str(checkpoint)
            if stage.wants_cams():
                _extract(before, checkpoint, cam_method, nproc)
                stage.config.train_dataloader.sampler.update(
                    cams=str(before.cams), checkpoint=str(checkpoint)
                )
        checkpoint = _train(stage, checkpoint, nproc, overwrite)
        before = stage
    return checkpoint


def _train(stage: Stage, parent: Path | None, nproc: int, overwrite: bool) -> Path:
    stage.config.work_dir = str(stage.folder)
    path = stage.folder / 'stage.py'
    note = stage.folder / 'stage.json'
    # The parent's path says nothing about its content.
    mark = dict(config=stage.config.pretty_text, parent=parent and file_digest(parent))
    earlier = json.loads(note.read_text()) if note.is_file() else None
    same = earlier is not None and earlier['mark'] == mark
    if same and earlier['checkpoint'] and Path(earlier['checkpoint']).is_file():
        print_log(f'Stage {stage.number} is finished: {earlier["checkpoint"]}')
        return Path(earlier['checkpoint'])
    if earlier is not None and not same and not overwrite:
        raise InputError(
            f'{stage.folder} holds stage {stage.number} of another recipe (config or parent '
            'checkpoint differs): choose another `--work-dir` or give `--overwrite`.'
        )
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, stage.config.pretty_text)
    write_text_atomic(note, json.dumps(dict(mark=mark, checkpoint=None)))
    start = ['--resume'] if same else ['--overwrite']
    _run([str(TOOLS / 'train.py'), str(path), *start], nproc, f'stage {stage.number}')
    checkpoint = last_checkpoint(stage.folder)
    if checkpoint is None or not checkpoint.is_file():
        raise InputError(
            f'stage {stage.number} wrote no checkpoint to {stage.folder}: configure '
            '`default_hooks.checkpoint`.'
        )
    write_text_atomic(note, json.dumps(dict(mark=mark, checkpoint=str(checkpoint))))
    return checkpoint


def _extract(stage: Stage, checkpoint: Path, method: str, nproc: int) -> None:
    arguments = [str(stage.folder / 'stage.py'), str(checkpoint), '--out', str(stage.cams)]
    note = stage.folder / 'cams.json'
    mark = dict(checkpoint=file_digest(checkpoint), method=method)
    if stage.cams.is_file() and note.is_file() and json.loads(note.read_text()) == mark:
        return
    stage.cams.unlink(missing_ok=True)
    tool = str(TOOLS / 'cam' / 'extract_cams.py')
    _run([tool, *arguments, '--method', method], nproc, f'the maps of stage {stage.number}')
    write_text_atomic(note, json.dumps(mark))


def _run(command: list[str], nproc: int, what: str) -> None:
    if nproc > 1:
        torchrun = [str(TOOLS / 'torchrun.py'), f'--nproc_per_node={nproc}', '--master_port=0']
        command = [*torchrun, *command, '--launcher', 'pytorch']
    status = subprocess.run([sys.executable, *command], check=False).returncode
    if status:
        raise InputError(f'{what} stopped with status {status}; its own message is above.')
