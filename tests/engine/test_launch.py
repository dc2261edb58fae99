"""Launching: status and messages, environment of launchers, gloo wrapping, threads."""

from __future__ import annotations

import argparse
import os
import signal
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('mmdet')

from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import distributed, nn

from mmdet_lt.engine import cpu_distributed, launch
from mmdet_lt.errors import InputError


def raising(error: BaseException):
    def main(argv):
        raise error

    return main


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(('SLURM_', 'OMPI_', 'OMP_', 'MMDET_LT_', 'TORCHELASTIC', 'MASTER_')):
            monkeypatch.delenv(name)
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (InputError('a key\n  is wrong.'), 'error: a key is wrong.'),
        (InputError('class `A` in a/b.py: class `B` in c.py: too few.'), 'error: too few.'),
        (KeyError('X is not in the mmdet::model registry.'), 'error: KeyError: X is not in the'),
        (FileNotFoundError(2, 'No such file', 'x.json'), 'error: file x.json expected, found n'),
    ],
)
def test_wrong_input_is_one_line_and_status_2(error, line, capsys):
    assert launch.run_cli(raising(error)) == 2
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count('\n') == 1


def test_bugs_pass_through():
    with pytest.raises(ZeroDivisionError):
        launch.run_cli(raising(ZeroDivisionError()))
    with pytest.raises(KeyError):
        launch.run_cli(raising(KeyError('x')))
    with pytest.raises(SystemExit):
        launch.run_cli(raising(SystemExit(0)))
    assert launch.run_cli(lambda argv: None) == 0


@pytest.mark.parametrize('follow_up', [None, RuntimeError('Connection closed by peer')])
def test_interrupt_is_130_without_trace(follow_up, capsys):
    """Also where SIGINT was ignored before, and where a broken connection is seen first."""

    def main(argv):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        except KeyboardInterrupt:
            raise follow_up or KeyboardInterrupt from None

    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert launch.run_cli(main) == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capsys.readouterr().err == 'interrupted\n'


def test_other_ranks_wait_before_they_speak(monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr(launch.time, 'sleep', pauses.append)
    monkeypatch.setenv('LOCAL_RANK', '1')
    assert launch.run_cli(raising(InputError('wrong.'))) == 2
    assert len(pauses) == 1 and capsys.readouterr().err == 'error: wrong.\n'


def arguments(path, **options):
    defaults = dict(config=str(path), cfg_options=None, launcher='none', work_dir=None)
    return argparse.Namespace(**{**defaults, **options})


def test_load_config(tmp_path):
    path = tmp_path / 'my_run.py'
    path.write_text('model = dict(type="M", depth=18)\n')
    cfg = launch.load_config(arguments(path))
    assert cfg.work_dir == os.path.join('.', 'work_dirs', 'my_run') and cfg.launcher == 'none'
    path.write_text('model = dict(type="M", depth=18)\nwork_dir = "from_file"\n')
    assert launch.load_config(arguments(path)).work_dir == 'from_file'
    options = dict(work_dir='given', cfg_options={'model.depth': 50})
    cfg = launch.load_config(arguments(path, **options))
    assert cfg.work_dir == 'given' and cfg.model.depth == 50
    with pytest.raises(InputError, match='found a folder'):
        launch.load_config(arguments(tmp_path))


def test_type_name():
    assert launch.type_name(dict(type='mmengine.AmpOptimWrapper')) == 'AmpOptimWrapper'
    assert launch.type_name(dict(type=Runner)) == 'Runner'
    assert launch.type_name({}) == ''


def test_mixed_precision_in_a_config_needs_a_gpu(monkeypatch):
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper')))
    monkeypatch.setattr(cpu_distributed, 'on_cpu', lambda: True)
    with pytest.raises(InputError, match='optim_wrapper.type'):
        launch.require_accelerator(cfg, 'optim_wrapper.type')
    monkeypatch.setattr(cpu_distributed, 'on_cpu', lambda: False)
    launch.require_accelerator(cfg, 'optim_wrapper.type')


def test_accelerator_runs_are_stock(monkeypatch):
    """With an accelerator neither the class nor the config is touched."""
    built = []
    monkeypatch.setattr(cpu_distributed, 'on_cpu', lambda: False)
    monkeypatch.setattr(Runner, 'from_cfg', classmethod(lambda cls, cfg: built.append((cls, cfg))))
    cfg = Config(dict(launcher='pytorch', env_cfg=dict(dist_cfg=dict(backend='nccl'))))
    launch.build_runner(cfg)
    assert built[0][0] is Runner
    assert cfg.env_cfg.dist_cfg.backend == 'nccl' and not distributed.is_initialized()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    for name in cpu_distributed._RANK_VARIABLES:
        monkeypatch.setenv(name, '1')
    with pytest.raises(InputError, match=r'local rank 1 .* only 1 GPU'):
        cpu_distributed.check_launcher('pytorch')
    monkeypatch.setenv('LOCAL_RANK', '0')
    cpu_distributed.check_launcher('pytorch')


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        ({}, 8),
        ({'LOCAL_WORLD_SIZE': '3'}, 2),
        ({'LOCAL_WORLD_SIZE': '16'}, 1),
        ({'LOCAL_WORLD_SIZE': '2', 'OMP_NUM_THREADS': '1', 'TORCHELASTIC_RUN_ID': 'x'}, 4),
        ({'LOCAL_WORLD_SIZE': '2', 'OMP_NUM_THREADS': '3', 'TORCHELASTIC_RUN_ID': 'x'}, 3),
        ({'LOCAL_WORLD_SIZE': '2', 'OMP_NUM_THREADS': '1'}, 1),
        ({'OMP_NUM_THREADS': '1', 'TORCHELASTIC_RUN_ID': 'x', 'MMDET_LT_NUM_THREADS': '1'}, 1),
    ],
)
def test_threads_per_rank(environment, expected, monkeypatch):
    monkeypatch.setattr(cpu_distributed, '_cores', lambda: 8)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    try:
        assert cpu_distributed.set_cpu_threads() == expected
    finally:
        torch.set_num_threads(before)
    monkeypatch.setenv('MMDET_LT_NUM_THREADS', 'many')
    with pytest.raises(InputError, match='found many'):
        cpu_distributed.set_cpu_threads()


class OtherWrapper(MMDistributedDataParallel):
    pass


def test_wrapping_for_gloo(tmp_path, monkeypatch):
    """Default settings are mmengine's, a config's own wrapper works, SyncBN is replaced."""
    MODEL_WRAPPERS.register_module(module=OtherWrapper)
    distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        cls = cpu_distributed.cpu_runner(Runner)
        assert issubclass(cls, Runner) and cls.__name__ == 'Runner'
        runner = SimpleNamespace(cfg=Config(dict(find_unused_parameters=True)), distributed=True)
        model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.SyncBatchNorm(2))
        wrapped = cls.wrap_model(runner, None, model)
        assert type(wrapped) is MMDistributedDataParallel
        assert wrapped.device_ids is None
        assert wrapped.find_unused_parameters and not wrapped.broadcast_buffers
        assert wrapped.module(torch.zeros(2, 1, 3, 3)).shape == (2, 2, 3, 3)

        options = dict(type='OtherWrapper', device_ids=[0], static_graph=True)
        wrapped = cls.wrap_model(runner, options, nn.Linear(1, 1))
        assert type(wrapped) is OtherWrapper and wrapped.static_graph
        assert options['device_ids'] == [0]  # the config is not changed
    finally:
        distributed.destroy_process_group()
        MODEL_WRAPPERS.module_dict.pop('OtherWrapper')
    with pytest.raises(InputError, match='runner_type dict'):
        cpu_distributed.cpu_runner(dict)
