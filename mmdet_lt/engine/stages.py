"""Train several configs one after another, each from the checkpoint of the one before.

Every stage has a folder of its own, ``<work_dir>/stage<k>``, with a note, ``stage.json``, of what
its run was begun with: the config, the content of the checkpoint it started from, the class
activation maps it pastes by. By this note a finished stage is reused, an interrupted one goes on,
and a run that was begun with something else is refused. Maps that a stage needs
(:class:`mmdet_lt.CAMSampler` without ``cams``) are extracted with the stage before it.

All of it happens in the processes that call: one, or all ranks of a launcher.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import barrier, broadcast_object_list, get_rank, init_dist, is_distributed
from mmengine.registry import init_default_scope
from mmengine.utils.dl_utils import set_multi_processing
from torch import distributed

from mmdet_lt.engine import checkpoints, cpu_distributed
from mmdet_lt.engine._stage import Stage, check_order, content
from mmdet_lt.errors import InputError

#: Trains a config: from scratch (from ``load_from``), or on from the last checkpoint if True.
Train = Callable[[Config, bool], None]


# ---- reading and checking, before anything is trained --------------------------------------------


def load_stages(
    sources: Sequence[str | Path], folder: str | Path, read: Callable[[str, Path], Config]
) -> list[Stage]:
    """Read the configs of a recipe.

    Args:
        sources: Config of each stage in order; the first may be a checkpoint (``.pth``).
        folder: Work directory of the recipe.
        read: Gives the config of a file with its work directory set.

    Raises:
        InputError: Fewer than two stages, a checkpoint that is missing or not the first, a config
            that decides itself what to resume, or maps asked for in the first stage.
    """
    if len(sources) < 2:
        raise InputError(
            f'a recipe has at least two stages, found {len(sources)}: give the config of each.'
        )
    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f'work directory {folder} expected, found a file there: correct it.')
    stages = []
    for number, source in enumerate(map(str, sources), 1):
        stage = Stage(number, source, Path(folder).resolve() / f'stage{number}')
        if source.endswith('.pth'):
            stage.source = _given(stage)
        else:
            config = read(source, stage.folder)
            if number == 2 and stages[0].config is None:
                # As with train.py, the command line goes before the config.
                config.load_from = stages[0].source
            stage.config = _prepared(config, stage)
        stages.append(stage)
    return stages


def _given(stage: Stage) -> str:
    if stage.number > 1:
        raise InputError(
            f'stage {stage.number} should be a config, found the checkpoint {stage.source}: only '
            'the first stage may be given as a checkpoint.'
        )
    checkpoints.check_checkpoint(stage.source, 'stage 1')
    remote = checkpoints.is_remote(stage.source)
    return stage.source if remote else str(Path(stage.source).expanduser().resolve())


def _prepared(config: Config, stage: Stage) -> Config:
    where = f'stage {stage.number} ({stage.source})'
    if config.get('resume'):
        raise InputError(
            f'{where} has `resume` set, but the recipe decides what is resumed: remove the key.'
        )
    if config.get('load_from'):
        checkpoints.check_checkpoint(config.load_from, f'load_from of stage {stage.number}')
    if (config.get('visualizer') or {}).get('name'):
        # A visualizer is found again by its name: that of stage 1 would go on drawing.
        config.visualizer.name = f'stage{stage.number}'
    if stage.number == 1 and Stage(1, '', stage.folder, config).wants_cams:
        raise InputError(
            f'{where} pastes by class activation maps, which the stage before would make: give '
            '`train_dataloader.sampler.cams`, or a stage before it.'
        )
    return config


def check_stages(stages: Sequence[Stage], cam_method: str) -> None:
    """Find out before the first stage is trained what a later one would refuse.

    Args:
        stages: From :func:`load_stages`.
        cam_method: 'gradcam' or 'hirescam'.

    Raises:
        InputError: A hook names a part that the model has not, or a detector has no maps.
    """
    for before, stage in zip(stages, stages[1:], strict=False):
        _check_hooks(stage.config)
        if stage.wants_cams:
            _check_cams(before, stage, cam_method)


def _check_hooks(config: Config) -> None:
    from mmdet.registry import HOOKS

    init_default_scope(config.get('default_scope', 'mmdet'))
    configs = [hook for hook in config.get('custom_hooks') or [] if isinstance(hook, dict)]
    hooks = [HOOKS.build(hook) for hook in copy.deepcopy(configs)]
    checking = [hook for hook in hooks if hasattr(hook, 'check_model')]
    model = _model(config) if checking else None
    for hook in checking:
        hook.check_model(model)


def _check_cams(before: Stage, stage: Stage, method: str) -> None:
    from mmdet_lt.cam.gradcam import box_cams
    from mmdet_lt.cam.sources import pipeline_config

    if before.config is None and checkpoints.is_remote(before.source):
        raise InputError(
            'stage 1 should be a local file where stage 2 pastes by its class activation maps, '
            f'found {before.source}: fetch it first.'
        )
    source = before if before.config is not None else stage
    config = source.config
    if not config.get('test_dataloader'):
        raise InputError(
            f'class activation maps need key `test_dataloader` in {source.source}, found none.'
        )
    pipeline_config(config)
    box_cams(_model(config), method)


def _model(config: Config) -> torch.nn.Module:
    from mmdet.registry import MODELS

    init_default_scope(config.get('default_scope', 'mmdet'))
    return MODELS.build(copy.deepcopy(config.model))


# ---- training ------------------------------------------------------------------------------------


def run_stages(
    stages: Sequence[Stage], train: Train, cam_method: str = 'hirescam', overwrite: bool = False
) -> str:
    """Train what is missing; all ranks call this together.

    Args:
        stages: From :func:`load_stages`.
        train: Trains a config. Settings of the process that it changes are put back.
        cam_method: 'gradcam' or 'hirescam', see :mod:`mmdet_lt.cam.gradcam`.
        overwrite: Train a stage again whose folder holds a run that was begun otherwise. Runs that
            fit are kept also then.

    Returns:
        The last checkpoint.

    Raises:
        InputError: A folder holds something else, or a stage cannot be trained.
    """
    _open_group(next(stage.config for stage in stages if stage.config is not None))
    if not overwrite:
        _on_first_rank(check_order, stages, cam_method)
    before: Stage | None = None
    checkpoint: str | None = None
    for stage in stages:
        if stage.config is None:
            checkpoint = stage.source
        else:
            checkpoint = _run(stage, before, checkpoint, train, cam_method, overwrite)
        before = stage
    return checkpoint


def _run(
    stage: Stage,
    before: Stage | None,
    parent: str | None,
    train: Train,
    cam_method: str,
    overwrite: bool,
) -> str:
    """Train a stage if its folder does not hold the result already; returns the checkpoint."""
    mark = _on_first_rank(stage.mark, parent, cam_method)
    state = _on_first_rank(stage.state, mark, overwrite)
    if state == 'finished':
        checkpoint = _on_first_rank(getattr, stage, 'result')
        _say(f'Stage {stage.number} is finished: {checkpoint}')
        return checkpoint
    _say(f'Stage {stage.number}: {stage.source}')
    config = _handed_over(stage, before, parent, cam_method)
    _on_first_rank(stage.begin, mark, state == 'new')
    with _own_settings():
        train(config, state == 'begun')
    barrier()  # rank 0 writes the checkpoint
    return _on_first_rank(stage.finish, mark)


def _handed_over(stage: Stage, before: Stage | None, checkpoint: str | None, method: str) -> Config:
    """Config of a stage with what the one before gives it."""
    config = copy.deepcopy(stage.config)
    if before is None:
        return config
    if not config.get('load_from'):
        config.load_from = checkpoint
    elif before.config is not None:
        _say(f'Stage {stage.number} starts from its own `load_from`: {config.load_from}')
    if stage.wants_cams:
        # The config that pastes describes a detector that was given as a checkpoint.
        cams = _extract(before.config or stage.config, before, checkpoint, method)
        config.train_dataloader.sampler.update(cams=cams, checkpoint=checkpoint)
    return config


def _extract(config: Config, before: Stage, checkpoint: str, method: str) -> str:
    from mmdet_lt.cam.extract import extract_cams

    digest = _on_first_rank(content, checkpoint)
    # Named by what it is made of, so that no file can be of another checkpoint or method.
    path = before.folder.with_name(f'stage{before.number}-{method}-{digest[:12]}.cams')
    # Ranks may wait long for each other here, which nccl takes for a fault.
    group = distributed.new_group(backend='gloo') if is_distributed() else None
    with _own_settings():
        extract_cams(copy.deepcopy(config), checkpoint, path, method=method, group=group)
    return str(path)


def _open_group(config: Config) -> None:
    """Let the ranks meet before the first runner, as it would do it itself."""
    if config.launcher == 'none' or is_distributed():
        return
    if cpu_distributed.on_cpu():
        cpu_distributed.init_cpu_group(config)
        return
    env = config.get('env_cfg') or {}
    set_multi_processing(**env.get('mp_cfg') or {}, distributed=True)
    init_dist(config.launcher, **env.get('dist_cfg') or {})


def _on_first_rank(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on one rank; all get its result, or its InputError."""
    answer: list[Any] = [None]
    if get_rank() == 0:
        try:
            answer = [function(*arguments)]
        except (InputError, FileNotFoundError) as error:
            answer = [error]
    broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


@contextmanager
def _own_settings() -> Iterator[None]:
    """Put back what a run sets for the whole process, and make room for the next one."""
    cudnn = torch.backends.cudnn
    flags = cudnn.benchmark, cudnn.deterministic
    strict = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = flags
        torch.use_deterministic_algorithms(strict)
        gc.collect()
        torch.cuda.empty_cache()


def _say(text: str) -> None:
    if get_rank() == 0:
        print(text, flush=True)
