"""The dist_ and slurm_ scripts on CPUs."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tool_helpers import REPO, clean_environment, run_tool

from mmdet_lt.engine.work_dir import last_checkpoint

SCRIPTS = sorted((REPO / 'tools').glob('*.sh'))
FAKE_SRUN = """#!/usr/bin/env bash
# Stands in for slurm: records the options and runs one task.
printf '%s\\n' "$@" > srun_arguments
while [[ $1 == -* ]]; do shift; done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_NODELIST=here
exec "$@"
"""


def records(folder: Path) -> list[list[str]]:
    return [path.read_text().splitlines() for path in sorted(folder.glob('rank*.txt'))]


def test_two_ranks_train_one_model(toy, tmp_path):
    """Other data on each rank, equal weights at the end; cores shared although torchrun says 1."""
    words = ('tools/dist_train.sh', toy.recorded, '2', '--work-dir', 'run')
    options = ('--cfg-options', 'model.backbone.norm_eval=False')
    done = run_tool(*words, *options, cwd=tmp_path, PYTHONPATH=str(toy.root))
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    first, second = records(tmp_path)
    backend, threads, images, parameters, buffers = range(5)
    assert first[backend] == second[backend] == 'gloo'
    cores = len(os.sched_getaffinity(0))
    if 'OMP_NUM_THREADS' not in os.environ and 'MMDET_LT_NUM_THREADS' not in os.environ:
        assert int(first[threads]) == max(1, cores // 2)
    assert first[images] != second[images]
    assert first[parameters] == second[parameters]
    # Running statistics of batch norm stay with their rank: buffers are not broadcast.
    assert first[buffers] != second[buffers]
    assert (tmp_path / 'run' / 'epoch_2.pth').is_file()


def test_an_error_of_all_ranks_is_said_once(tmp_path):
    """The status of the tool comes through torchrun, without torchrun's own trace."""
    done = run_tool('tools/dist_train.sh', 'missing.py', '2', cwd=tmp_path)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and 'missing.py' in errors[0]
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('tool', ['tools/dist_train.sh', 'tools/train.py'])
def test_interrupt_and_resume(tool, toy, tmp_path):
    config = [str(toy.config), '2'] if tool.endswith('.sh') else [str(toy.config)]
    base = [*config, '--work-dir', 'run']
    python = [] if tool.endswith('.sh') else [clean_environment()['PYTHON']]
    with open(tmp_path / 'err', 'w') as err:
        run = subprocess.Popen(
            [*python, str(REPO / tool), *base, '--cfg-options', 'train_cfg.max_epochs=5000'],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
        )
        try:
            limit = time.monotonic() + 120
            while not (tmp_path / 'run' / 'last_checkpoint').is_file():
                assert run.poll() is None and time.monotonic() < limit
                time.sleep(0.05)
            started = time.monotonic()
            os.killpg(run.pid, signal.SIGINT)  # Ctrl-C in a terminal
            assert run.wait(30) == 130
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    assert time.monotonic() - started < 20
    text = (tmp_path / 'err').read_text()
    assert 'Traceback' not in text and text.count('interrupted\n') == 1

    epoch = int(last_checkpoint(tmp_path / 'run').stem.removeprefix('epoch_'))
    options = ('--resume', '--cfg-options', f'train_cfg.max_epochs={epoch + 1}')
    done = run_tool(tool, *base, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'resumed epoch: {epoch}' in done.stdout
    assert (tmp_path / 'run' / f'epoch_{epoch + 1}.pth').is_file()


def test_two_ranks_test_like_one(toy, trained, tmp_path):
    """All images, each once, with the predictions of a single process."""
    base = (toy.config, trained / 'epoch_2.pth')
    for words in (('tools/dist_test.sh', *base, '2'), ('tools/test.py', *base)):
        out = f'{len(words)}.pkl'
        done = run_tool(*words, '--work-dir', 'run', '--out', out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    results = []
    for name in ('4.pkl', '3.pkl'):
        with open(tmp_path / name, 'rb') as file:
            loaded = {result['img_id']: result['pred_instances'] for result in pickle.load(file)}
        results.append(loaded)
    two, one = results
    assert sorted(two) == sorted(one) == list(range(1, 9))
    for image, expected in one.items():
        assert two[image]['scores'].allclose(expected['scores'], atol=1e-5)


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    done = subprocess.run(['bash', '-n', str(script)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ''
    if script.name != 'common.sh':
        assert os.access(script, os.X_OK)


@pytest.mark.parametrize(
    ('words', 'part'),
    [
        (('tools/dist_train.sh', 'c.py'), 'usage: dist_train.sh CONFIG GPUS'),
        (('tools/dist_train.sh', 'c.py', 'many'), "found 'many'"),
        (('tools/dist_test.sh', 'c.py', 'x.pth', '0'), "found '0'"),
        (('tools/slurm_train.sh', 'part', 'job'), 'usage: slurm_train.sh PARTITION'),
        (('tools/slurm_test.sh',), 'usage: slurm_test.sh PARTITION'),
    ],
)
def test_bad_script_arguments(words, part, tmp_path):
    done = run_tool(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and part in done.stderr


def fake_slurm(folder: Path) -> dict[str, str]:
    (folder / 'bin').mkdir()
    (folder / 'bin' / 'srun').write_text(FAKE_SRUN)
    (folder / 'bin' / 'srun').chmod(0o755)
    return {'PATH': f'{folder / "bin"}{os.pathsep}{os.environ["PATH"]}', 'GPUS': '1'}


def test_slurm_scripts(toy, trained, tmp_path):
    env = fake_slurm(tmp_path) | {'GPUS_PER_NODE': '0', 'SRUN_ARGS': '--quiet --exclusive'}
    words = ('tools/slurm_train.sh', 'part', 'job', toy.recorded, 'run')
    done = run_tool(*words, cwd=tmp_path, PYTHONPATH=str(toy.root), **env)
    assert done.returncode == 0, done.stderr
    assert records(tmp_path)[0][0] == 'gloo'
    assert (tmp_path / 'run' / 'epoch_2.pth').is_file()
    options = (tmp_path / 'srun_arguments').read_text().splitlines()
    assert {'--partition=part', '--job-name=job', '--ntasks=1', '--quiet', '--exclusive'} <= {
        *options
    }
    assert not any(option.startswith('--gres') for option in options)

    words = ('tools/slurm_test.sh', 'part', 'job', toy.config, trained / 'epoch_2.pth')
    done = run_tool(*words, '--work-dir', 'run', cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert 'coco/bbox_mAP' in done.stdout


def test_slurm_asks_for_gpus(tmp_path):
    """One task per GPU, at most GPUS on a node; the tool's own error passes through."""
    env = fake_slurm(tmp_path) | {'GPUS': '2', 'CPUS_PER_TASK': '3'}
    words = ('tools/slurm_train.sh', 'part', 'job', 'missing.py', 'run', '--resume')
    done = run_tool(*words, cwd=tmp_path, **env)
    assert done.returncode == 2 and 'missing.py' in done.stderr
    options = (tmp_path / 'srun_arguments').read_text().splitlines()
    expected = {'--gres=gpu:2', '--ntasks=2', '--ntasks-per-node=2', '--cpus-per-task=3'}
    assert expected <= {*options}
    assert options[-6:] == ['missing.py', '--work-dir', 'run', '--resume', '--launcher', 'slurm']
