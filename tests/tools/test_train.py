"""tools/train.py with MMDetection's real runner on the toy task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tool_helpers import run_tool


def losses(work_dir: Path) -> dict[int, float]:
    """Loss by iteration over all runs in a work directory."""
    found = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if 'loss' in record:
                found[record['step']] = record['loss']
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


def is_one_error(lines: list[str], *parts: str) -> bool:
    assert len(lines) == 1 and lines[0].startswith('error: '), lines
    for part in parts:
        assert part in lines[0], lines[0]
    return True


def test_train_writes_checkpoints_and_learns(trained):
    assert {'epoch_1.pth', 'epoch_2.pth', 'last_checkpoint', 'retinanet.py'} <= {
        path.name for path in trained.iterdir()
    }
    run = losses(trained)
    assert sorted(run) == list(range(1, 9))  # 8 images, batches of 2, 2 epochs
    assert run[8] < run[1]


def test_resume_repeats_the_uninterrupted_run(toy, trained, tmp_path):
    """Stop after one epoch and resume, from another folder: same losses, bit for bit."""
    epochs = '--cfg-options', 'train_cfg.max_epochs={}'
    work_dir = tmp_path / 'run'
    first = ('tools/train.py', toy.config, '--work-dir', work_dir, epochs[0], epochs[1].format(1))
    done = run_tool(*first, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(losses(work_dir)) == [1, 2, 3, 4]

    done = run_tool('tools/train.py', toy.config, '--work-dir', 'run', '--resume', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    assert 'resumed epoch: 1, iter: 4' in done.stdout
    assert 'train_cfg.max_epochs` was 1 and is now 2' in done.stdout
    assert losses(work_dir) == losses(trained)


def test_mmdets_own_tool_resumes(toy, trained, tmp_path):
    """Importing the package is enough for torch's safe loader to accept the checkpoint."""
    import mmdet

    tool = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
    if not tool.is_file():
        pytest.skip('this MMDetection ships no tools')
    config = tmp_path / 'retinanet.py'
    config.write_text(toy.config.read_text() + "custom_imports = dict(imports=['mmdet_lt'])\n")
    shutil.copytree(trained, tmp_path / 'run')
    note = tmp_path / 'run' / 'last_checkpoint'
    note.write_text(str(tmp_path / 'run' / 'epoch_1.pth'))
    repo = str(Path(__file__).resolve().parents[2])
    words = (tool, config, '--work-dir', 'run', '--resume')
    done = run_tool(*words, cwd=tmp_path, PYTHONPATH=repo)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'resumed epoch: 1, iter: 4' in done.stdout


def test_refusals_leave_the_work_directory_alone(toy, trained, call):
    before = snapshot(trained)
    base = 'train', toy.config, '--work-dir', trained
    status, lines = call(*base)
    assert status == 2
    assert is_one_error(
        lines, str(trained), 'epoch_2.pth', 'same config', '--resume', '--overwrite'
    )

    status, lines = call('train', toy.other, '--work-dir', trained)
    assert status == 2
    assert is_one_error(lines, "`model.type` was 'RetinaNet' and is now 'FasterRCNN'")
    assert '--resume' not in lines[0]

    status, lines = call('train', toy.other, '--work-dir', trained, '--resume')
    assert status == 2
    assert is_one_error(lines, 'cannot resume', "`model.type` was 'RetinaNet'")

    options = '--resume', '--cfg-options', "train_dataloader.dataset.metainfo.classes=('x','y','z')"
    status, lines = call(*base, *options)
    assert status == 2
    assert is_one_error(lines, '`train_dataloader.dataset.metainfo.classes` was', "'x'")
    assert snapshot(trained) == before


def test_overwrite_starts_from_scratch(toy, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    old = (tmp_path / 'run' / 'epoch_1.pth').stat().st_mtime_ns
    words = ('tools/train.py', toy.config, '--work-dir', 'run', '--overwrite')
    epochs = ('--cfg-options', 'train_cfg.max_epochs=1')
    done = run_tool(*words, *epochs, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'Epoch(train) [1][1/4]' in done.stdout and 'resumed' not in done.stdout
    assert (tmp_path / 'run' / 'epoch_1.pth').stat().st_mtime_ns > old
    assert (tmp_path / 'run' / 'last_checkpoint').read_text().endswith('epoch_1.pth')


def test_bad_input_of_a_process_is_one_line(toy, tmp_path):
    """The real process: status 2, one line, no trace, nothing written."""
    # The onedl fork of mmdet warns and prints while it is imported.
    quiet = dict(PYTHONWARNINGS='ignore')
    done = run_tool('tools/train.py', 'missing.py', '--work-dir', 'run', cwd=tmp_path, **quiet)
    assert done.returncode == 2
    assert is_one_error(done.stderr.splitlines(), 'missing.py')
    printed = [line for line in done.stdout.splitlines() if 'Could not import OneDL' not in line]
    assert printed == [] and list(tmp_path.iterdir()) == []


def test_trace_on_demand(call, tmp_path, monkeypatch):
    monkeypatch.setenv('MMDET_LT_TRACEBACK', '1')
    status, lines = call('train', tmp_path / 'missing.py')
    assert status == 2
    assert lines[0].startswith('Traceback') and lines[-1].startswith('error: ')


@pytest.mark.parametrize(
    ('options', 'parts'),
    [
        (['--resume', 'missing.pth'], ['missing.pth', '--resume']),
        (['--resume', 'truncated.pth'], ['truncated.pth', '--resume', 'truncated']),
        (['--resume', 'empty.pth'], ['empty.pth', '0 bytes']),
        (['--resume', 'text.pth'], ['text.pth', 'not a checkpoint']),
        (['--resume', 'weights.pth'], ['weights.pth', '`meta`', 'load_from']),
        (['--cfg-options', 'load_from=missing.pth'], ['missing.pth', 'load_from']),
        (['--cfg-options', 'nonsense'], ['--cfg-options', 'key=value']),
        (['--cfg-options', 'model.type.deep=1'], ['--cfg-options']),
        (['--amp'], ['--amp', 'GPU']),
        (['--auto-scale-lr'], ['auto_scale_lr.enable']),
        (['--launcher', 'pytorch'], ['torchrun', 'RANK']),
        (['--launcher', 'slurm'], ['srun', 'SLURM_PROCID']),
    ],
)
def test_bad_options(options, parts, toy, trained, call, tmp_path, monkeypatch):
    import torch

    for name in ('RANK', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    whole = (trained / 'epoch_1.pth').read_bytes()
    Path('truncated.pth').write_bytes(whole[: len(whole) // 2])
    Path('empty.pth').touch()
    Path('text.pth').write_text('this is no checkpoint\n')
    torch.save({'state_dict': {'x': torch.zeros(1)}}, 'weights.pth')
    before = snapshot(tmp_path)
    status, lines = call('train', toy.config, '--work-dir', 'run', *options)
    assert status == 2
    assert is_one_error(lines, *parts)
    assert snapshot(tmp_path) == before


def test_broken_config_is_one_sentence(call, tmp_path):
    broken = tmp_path / 'broken.py'
    broken.write_text('model = dict(\n')
    status, lines = call('train', broken)
    assert status == 2 and is_one_error(lines, 'broken.py')
    broken.write_text("custom_imports = dict(imports=['no_such_module'])\n")
    status, lines = call('train', broken)
    assert status == 2 and is_one_error(lines, 'broken.py', 'no_such_module')
    broken.write_text('train_cfg = dict()\n')
    status, lines = call('train', broken)
    assert status == 2 and is_one_error(lines, 'broken.py', '`model`')
