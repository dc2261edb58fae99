"""tools/decoupled.py: both stages by one command, resumed, refused, on two ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tool_helpers import run_tool
from toy import make_toy_coco, write_toy_config

CLASSIFIER = 'roi_head.bbox_head.fc_cls'
NAMES = {f'{CLASSIFIER}.weight', f'{CLASSIFIER}.bias'}
HOOKS = """
custom_imports = dict(imports=['mmdet_lt'])
model['backbone']['norm_eval'] = False
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.FreezeHook', trainable=['{trainable}']),
    dict(type='mmdet_lt.ClassifierInitHook', mode='{mode}'),
]
"""


def second_config(folder: Path, name: str, trainable: str = CLASSIFIER, mode: str = 'reinit'):
    extra = HOOKS.format(trainable=trainable, mode=mode)
    return write_toy_config(folder / f'{name}.py', folder / 'data', 'faster_rcnn', extra)


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    """Toy data, both configs, and the folder of a finished run."""
    root = tmp_path_factory.mktemp('decoupled')
    make_toy_coco(root / 'data')
    first = write_toy_config(root / 'first.py', root / 'data', 'faster_rcnn')
    words = ('tools/decoupled.py', first, second_config(root, 'crt'), '--work-dir', 'run')
    done = run_tool(*words, cwd=root)
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    return root


@pytest.fixture
def copy(recipe, tmp_path):
    """A copy of the finished run, to be changed."""
    shutil.copytree(recipe, tmp_path / 'copy')
    for note in tmp_path.glob('copy/run/stage*/last_checkpoint'):  # it holds an absolute path
        note.write_text(str(note.with_name('epoch_1.pth')))
    return tmp_path / 'copy'


def weights(path):
    return torch.load(path, map_location='cpu', weights_only=False)['state_dict']


def changed(first: Path, second: Path) -> set[str]:
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def times(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted(folder.glob('run/stage*/*.pth'))]


def test_both_stages_are_trained(recipe):
    run = recipe / 'run'
    assert changed(run / 'stage1' / 'epoch_1.pth', run / 'stage2' / 'epoch_1.pth') == NAMES
    for stage in ('stage1', 'stage2'):  # each stage draws into its own folder
        (scalars,) = (run / stage).glob('*/vis_data/scalars.json')
        steps = [json.loads(line)['step'] for line in scalars.read_text().splitlines()]
        assert steps == [1, 2, 3, 4]


def test_a_finished_run_is_reused(copy, call):
    before = times(copy)
    words = (copy / 'first.py', copy / 'crt.py', '--work-dir', copy / 'run')
    assert call('decoupled', *words)[0] == 0
    assert times(copy) == before and len(before) == 2


def test_an_interrupted_second_stage_goes_on(copy):
    """One epoch is done, two are wanted: the classifier goes on, stage 1 is not touched."""
    text = (copy / 'crt.py').read_text()
    (copy / 'crt.py').write_text(text + "train_cfg['max_epochs'] = 2\n")
    before = times(copy)
    done = run_tool('tools/decoupled.py', 'first.py', 'crt.py', '--work-dir', 'run', cwd=copy)
    assert done.returncode == 0 and 'Stage 1 is finished' in done.stdout, done.stderr
    run = copy / 'run'
    assert times(copy)[:2] == before
    assert changed(run / 'stage1' / 'epoch_1.pth', run / 'stage2' / 'epoch_2.pth') == NAMES
    last = torch.load(run / 'stage2' / 'epoch_2.pth', weights_only=False)
    assert last['meta']['iter'] == 8


def test_a_second_stage_of_another_first_one_is_refused(copy, call):
    run = copy / 'run'
    checkpoint = torch.load(run / 'stage1' / 'epoch_1.pth', weights_only=False)
    checkpoint['state_dict']['backbone.conv1.weight'] += 1
    torch.save(checkpoint, run / 'stage1' / 'epoch_1.pth')
    words = (copy / 'first.py', copy / 'crt.py', '--work-dir', run)
    status, lines = call('decoupled', *words)
    assert status == 2 and len(lines) == 1 and 'another first stage' in lines[0]
    shutil.rmtree(run / 'stage1')
    status, lines = call('decoupled', *words)
    assert status == 2 and 'stage 1 in' in lines[0] and 'not finished' in lines[0]
    assert not (run / 'stage1').exists()


def test_a_checkpoint_in_place_of_the_first_stage(copy):
    checkpoint = copy / 'run' / 'stage1' / 'epoch_1.pth'
    config = second_config(copy, 'lws', mode='keep')
    done = run_tool('tools/decoupled.py', checkpoint, config, '--work-dir', 'lws', cwd=copy)
    assert done.returncode == 0, done.stderr
    assert not (copy / 'lws' / 'stage1').exists()
    assert changed(checkpoint, copy / 'lws' / 'stage2' / 'epoch_1.pth') == NAMES


@pytest.mark.parametrize(
    ('trainable', 'part'),
    [('roi_head.bbox_head.fc_clz', 'FreezeHook.trainable'), ('nothing', 'nearest names')],
)
def test_wrong_patterns_stop_before_stage_1(recipe, tmp_path, call, trainable, part):
    config = second_config(recipe, 'wrong', trainable)
    status, lines = call('decoupled', recipe / 'first.py', config, '--work-dir', tmp_path / 'run')
    assert status == 2 and len(lines) == 1 and part in lines[0] and trainable in lines[0]
    assert not (tmp_path / 'run').exists()


def test_missing_inputs(recipe, tmp_path, call):
    config = recipe / 'crt.py'
    status, lines = call('decoupled', tmp_path / 'no.py', config, '--work-dir', tmp_path / 'x')
    assert status == 2 and 'no.py expected' in lines[0]
    status, lines = call('decoupled', tmp_path / 'no.pth', config, '--work-dir', tmp_path / 'x')
    assert status == 2 and 'no.pth' in lines[0] and 'stage1' in lines[0]
    assert not (tmp_path / 'x').exists()


def test_the_script_says_how_it_is_used(tmp_path):
    done = run_tool('tools/dist_decoupled.sh', 'a.py', 'b.py', cwd=tmp_path)
    assert done.returncode == 2 and 'usage: dist_decoupled.sh STAGE1 STAGE2 GPUS' in done.stderr


@pytest.mark.slow
def test_two_ranks(recipe, tmp_path):
    """The wrapper of a frozen model waits for no gradient that never comes; then all is reused."""
    words = ('tools/dist_decoupled.sh', recipe / 'first.py', recipe / 'crt.py', '2')
    done = run_tool(*words, '--work-dir', 'run', cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    run = tmp_path / 'run'
    assert changed(run / 'stage1' / 'epoch_1.pth', run / 'stage2' / 'epoch_1.pth') == NAMES
    before = times(tmp_path)
    done = run_tool(*words, '--work-dir', 'run', cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    assert times(tmp_path) == before
