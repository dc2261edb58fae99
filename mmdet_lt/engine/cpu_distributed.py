"""Distributed runs without an accelerator: gloo instead of nccl, wrapping without device ids.

mmengine's launchers call ``torch.cuda.set_device`` and its runner wraps the model with
``device_ids``; both fail on a CPU. Here the process group is opened before the runner is built
(mmengine then leaves it alone), and a runner subclass wraps the model. On an accelerator nothing
of this is used.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import warnings
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import distributed, nn

from mmdet_lt.errors import InputError

_RANK_VARIABLES = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')
# Per launcher: our name -> the variable that holds it.
_LAUNCHER_VARIABLES = {
    'slurm': {'RANK': 'SLURM_PROCID', 'LOCAL_RANK': 'SLURM_LOCALID', 'WORLD_SIZE': 'SLURM_NTASKS'},
    'mpi': {
        'RANK': 'OMPI_COMM_WORLD_RANK',
        'LOCAL_RANK': 'OMPI_COMM_WORLD_LOCAL_RANK',
        'WORLD_SIZE': 'OMPI_COMM_WORLD_SIZE',
    },
}


def on_cpu() -> bool:
    """Whether models of this process are put on the CPU."""
    return get_device() == 'cpu'


def check_launcher(launcher: str) -> None:
    """Refuse a launcher whose environment is not there, or that started too many processes.

    Raises:
        InputError: The launcher cannot work.
    """
    if launcher == 'none':
        return
    needed = _LAUNCHER_VARIABLES.get(launcher, {name: name for name in _RANK_VARIABLES})
    for variable in needed.values():
        if variable not in os.environ:
            how = {'slurm': 'srun', 'mpi': 'mpirun'}.get(launcher, 'torchrun or tools/dist_*.sh')
            raise InputError(
                f'--launcher {launcher} expects the environment of {how}, but {variable} is not '
                f'set: start the tool with {how}, or leave --launcher out.'
            )
    devices = torch.cuda.device_count()
    local_rank = int(os.environ[needed['LOCAL_RANK']])
    if torch.cuda.is_available() and local_rank >= devices:
        raise InputError(
            f'a process with local rank {local_rank} was started, but only {devices} GPU(s) are '
            'visible here: ask for fewer processes on this machine, or set CUDA_VISIBLE_DEVICES.'
        )


def init_cpu_group(cfg: Config) -> None:
    """Open a gloo process group for the launcher in ``cfg`` and share the cores among the ranks.

    Args:
        cfg: Config; its ``env_cfg.dist_cfg`` gives the timeout, and its backend is set to gloo.
    """
    for name, variable in _LAUNCHER_VARIABLES.get(cfg.launcher, {}).items():
        os.environ[name] = os.environ[variable]
    if cfg.launcher != 'pytorch':
        os.environ.setdefault('MASTER_PORT', '29500')
        os.environ.setdefault('MASTER_ADDR', _first_slurm_host())
    options = dict((cfg.get('env_cfg') or {}).get('dist_cfg') or {})
    options['backend'] = 'gloo'
    cfg.merge_from_dict({'env_cfg': {'dist_cfg': options}})
    set_cpu_threads()
    if distributed.is_initialized():  # an earlier run of the same processes opened it
        return
    timeout = options.get('timeout')
    limit = {} if timeout is None else {'timeout': datetime.timedelta(seconds=timeout)}
    distributed.init_process_group('gloo', **limit)


def set_cpu_threads() -> int:
    """Give each rank its share of the cores; the number of threads torch uses from now on.

    ``MMDET_LT_NUM_THREADS`` decides if set, then ``OMP_NUM_THREADS``. A value of 1 under torchrun
    is not taken as a wish: torchrun itself sets it for every run with more than one process, which
    suits GPUs and leaves most cores of a CPU run idle.
    """
    wish = os.environ.get('MMDET_LT_NUM_THREADS')
    omp = os.environ.get('OMP_NUM_THREADS')
    if not wish and omp and not (omp == '1' and 'TORCHELASTIC_RUN_ID' in os.environ):
        wish = omp
    if not wish:
        local_size = os.environ.get('LOCAL_WORLD_SIZE') or os.environ.get('WORLD_SIZE') or '1'
        wish = str(_cores() // int(local_size))
    try:
        torch.set_num_threads(max(1, int(wish)))
    except ValueError as error:
        raise InputError(
            f'number of threads expected in MMDET_LT_NUM_THREADS or OMP_NUM_THREADS, found {wish}.'
        ) from error
    return torch.get_num_threads()


def _cores() -> int:
    if hasattr(os, 'sched_getaffinity'):  # respects taskset and slurm's binding
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _first_slurm_host() -> str:
    nodes = os.environ.get('SLURM_NODELIST', '')
    try:
        command = ['scontrol', 'show', 'hostnames', nodes]
        hosts = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        hosts = []
    if hosts:
        return hosts[0]
    if os.environ.get('SLURM_NNODES', '1') == '1':
        return '127.0.0.1'
    raise InputError('MASTER_ADDR is not set and scontrol cannot name the first node: set it.')


class CPUDistributedMixin:
    """Runner that wraps its model for gloo."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap like ``Runner.wrap_model``, without device ids.

        Args:
            model_wrapper_cfg: Config of another wrapper, or None for DistributedDataParallel with
                mmengine's settings.
            model: The model.
        """
        if is_model_wrapper(model):
            return super().wrap_model(model_wrapper_cfg, model)  # type: ignore[misc]
        # Synchronised batch norm has no CPU kernel.
        model = revert_sync_batchnorm(model.to(get_device()))
        if model_wrapper_cfg is None:
            unused = self.cfg.get('find_unused_parameters', False)  # type: ignore[attr-defined]
            with warnings.catch_warnings():
                # torch 2.13 renames the option; its successor still syncs once at the start.
                warnings.filterwarnings('ignore', '.*broadcast_buffers.*', FutureWarning)
                return MMDistributedDataParallel(
                    module=model, broadcast_buffers=False, find_unused_parameters=unused
                )
        options: dict[str, Any] = dict(model_wrapper_cfg)
        options.setdefault('type', 'MMDistributedDataParallel')
        for name in ('device_ids', 'output_device'):
            options.pop(name, None)
        return MODEL_WRAPPERS.build(options, default_args={'module': model})


def cpu_runner(cls: type) -> type:
    """Subclass a runner so that it can train with several processes on a CPU.

    Raises:
        InputError: The class is not built on mmengine's Runner.
    """
    if not issubclass(cls, Runner):
        raise InputError(
            f'runner_type {cls.__name__} cannot run with several processes on a CPU: '
            'remove `runner_type`, or start one process.'
        )
    return type(cls.__name__, (CPUDistributedMixin, cls), {})
