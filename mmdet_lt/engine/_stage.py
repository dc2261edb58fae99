"""A stage of a recipe and the note in its folder, for :mod:`mmdet_lt.engine.stages`.

The note ``stage.json`` holds the *mark* of a run, which is what it was begun with (config, content
of the checkpoint it started from, class activation maps), and its last checkpoint once it is done.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdet_lt.engine import checkpoints, launch, work_dir
from mmdet_lt.engine.config_diff import describe, differences, flatten
from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import file_digest, read_json, write_text_atomic

_NOTE = 'stage.json'


@dataclass
class Stage:
    """One stage of a recipe.

    Args:
        number: From 1.
        source: Config file, or the checkpoint that stands for the first stage.
        folder: Work directory of its run.
        config: The config, None for a checkpoint.
    """

    number: int
    source: str
    folder: Path
    config: Config | None = None

    @property
    def wants_cams(self) -> bool:
        """Whether the stage pastes by maps that its config does not name."""
        if self.config is None:
            return False
        sampler = self.config.train_dataloader.get('sampler') or {}
        by_cam = sampler.get('mask_source', 'cam') == 'cam' and not sampler.get('cams')
        return launch.type_name(sampler) == 'CAMSampler' and by_cam

    @property
    def needs_earlier(self) -> bool:
        """Whether it starts from an earlier stage, or pastes by maps of one."""
        return self.number > 1 and (not self.config.get('load_from') or self.wants_cams)

    @property
    def checkpoint(self) -> Path | None:
        """The last checkpoint of its run."""
        return work_dir.last_checkpoint(self.folder)

    @property
    def result(self) -> str:
        """The checkpoint of its finished run."""
        return str(self.folder / self._note()['checkpoint'])

    def mark(self, parent: str | None, cam_method: str) -> dict[str, Any]:
        """What its run begins with; of checkpoints the content, which their path does not tell.

        Args:
            parent: Checkpoint of the stage before.
            cam_method: Method of the maps.
        """
        return dict(
            config=flatten(self.config.to_dict()),
            load_from=content(self.config.get('load_from') or parent),
            cams=[cam_method, content(parent)] if self.wants_cams else None,
        )

    def state(self, mark: dict[str, Any], overwrite: bool) -> str:
        """'finished', 'begun' or 'new'.

        Raises:
            InputError: The folder holds checkpoints of something else, and ``overwrite`` is not
                given.
        """
        note = self._note()
        odd = 'by another tool' if note is None else _difference(note['mark'], mark)
        if not odd and note['checkpoint'] and (self.folder / note['checkpoint']).is_file():
            return 'finished'
        if not odd and self.checkpoint is not None:
            return 'begun'
        saved = work_dir.saved_checkpoints(self.folder)
        if saved and not overwrite:
            raise InputError(
                f'{self.folder} holds {saved[-1].name} of a run that was begun '
                f'{odd or "here, but no file last_checkpoint"}: give another --work-dir, or '
                f'--overwrite to train stage {self.number} again.'
            )
        return 'new'

    def begin(self, mark: dict[str, Any], anew: bool) -> None:
        """Write the note of a run that is about to be trained."""
        if anew:  # the note must never speak of older checkpoints
            work_dir.forget_earlier_run(self.folder)
        self._write_note(mark, None)

    def finish(self, mark: dict[str, Any]) -> str:
        """Note that the run is done; returns its checkpoint.

        Raises:
            InputError: There is none.
        """
        checkpoint = self.checkpoint
        if checkpoint is None or not checkpoint.is_file():
            raise InputError(
                f'stage {self.number} wrote no checkpoint to {self.folder}: configure '
                f'`default_hooks.checkpoint` in {self.source}.'
            )
        self._write_note(mark, checkpoint.name)
        return self.result

    def _note(self) -> dict[str, Any] | None:
        path = self.folder / _NOTE
        note = read_json(path, '--work-dir', 'note') if path.is_file() else None
        return note if isinstance(note, dict) and 'cams' in (note.get('mark') or {}) else None

    def _write_note(self, mark: dict[str, Any], checkpoint: str | None) -> None:
        write_text_atomic(self.folder / _NOTE, json.dumps(dict(mark=mark, checkpoint=checkpoint)))


def content(checkpoint: str | None) -> str | None:
    """Digest of a checkpoint; of a remote one the address."""
    if not checkpoint or checkpoints.is_remote(checkpoint):
        return checkpoint or None
    return file_digest(Path(checkpoint).expanduser())


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In what two marks differ, empty if they do not."""
    changed = differences(old['config'], new['config'])
    if changed:
        key = min(changed, key=lambda name: (name.count('.'), name))
        return f'with another config ({describe(key, changed[key])})'
    if old['load_from'] != new['load_from']:
        return 'from another checkpoint'
    return 'with other class activation maps' if old['cams'] != new['cams'] else ''


def check_order(stages: Sequence[Stage], cam_method: str) -> None:
    """Look through all folders, so that a recipe is refused before its first stage is trained.

    Raises:
        InputError: As :meth:`Stage.state`, or a stage has checkpoints although the one it starts
            from is not finished.
    """
    parent: str | None = None
    waiting: Stage | None = None
    for stage in stages:
        if stage.config is None:
            parent = stage.source
            continue
        if not stage.needs_earlier:
            waiting = None
        if waiting is None:
            finished = stage.state(stage.mark(parent, cam_method), False) == 'finished'
            parent = stage.result if finished else None
            waiting = None if finished else stage
        elif work_dir.saved_checkpoints(stage.folder):
            raise InputError(
                f'{stage.folder} holds checkpoints, but stage {waiting.number} in '
                f'{waiting.folder} is not finished: stage {stage.number} began from another '
                'checkpoint; give another --work-dir, or --overwrite.'
            )
