"""tools/train_stages.py: all stages by one command, resumed, refused, on two ranks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tool_helpers import load_tool, run_tool
from toy import make_toy_coco, write_toy_config

from mmdet_lt.cam.store import CAMFile

TOOL = 'tools/train_stages.py'
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
PASTE = """
custom_imports = dict(imports=['mmdet_lt'])
train_dataloader['dataset']['pipeline'].insert(2, dict(type='mmdet_lt.CAMPaste'))
train_dataloader['sampler'] = dict(type='mmdet_lt.CAMSampler')
"""


def second_config(folder: Path, name: str, trainable: str = CLASSIFIER, mode: str = 'reinit'):
    extra = HOOKS.format(trainable=trainable, mode=mode)
    return write_toy_config(folder / f'{name}.py', folder / 'data', 'faster_rcnn', extra)


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    """Toy data, three configs, and the folder of a finished run of the first two."""
    root = tmp_path_factory.mktemp('stages')
    make_toy_coco(root / 'data')
    first = write_toy_config(root / 'first.py', root / 'data', 'faster_rcnn')
    write_toy_config(root / 'cam.py', root / 'data', 'faster_rcnn', PASTE)
    done = run_tool(TOOL, first, second_config(root, 'crt'), '--work-dir', 'run', cwd=root)
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
    assert call('train_stages', *words)[0] == 0
    assert times(copy) == before and len(before) == 2


def test_an_interrupted_second_stage_goes_on(copy):
    """One epoch of two is done: the classifier goes on, stage 1 is not touched."""
    text = (copy / 'crt.py').read_text()
    (copy / 'crt.py').write_text(text + "train_cfg['max_epochs'] = 2\n")
    words = (TOOL, 'first.py', 'crt.py', '--work-dir', 'run')
    done = run_tool(*words, cwd=copy)
    assert done.returncode == 2 and '`train_cfg.max_epochs` was 1 and is now 2' in done.stderr
    path = copy / 'run' / 'stage2' / 'stage.json'
    note = json.loads(path.read_text())
    note['mark']['config']['train_cfg.max_epochs'] = 2  # as if it had been so from the start
    path.write_text(json.dumps(dict(note, checkpoint=None)))
    before = times(copy)
    done = run_tool(*words, cwd=copy)
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
    status, lines = call('train_stages', *words)
    assert status == 2 and len(lines) == 1 and 'begun from another checkpoint' in lines[0]
    shutil.rmtree(run / 'stage1')
    status, lines = call('train_stages', *words)
    assert status == 2 and 'stage 1 in' in lines[0] and 'not finished' in lines[0]
    assert not (run / 'stage1').exists()


def test_a_checkpoint_in_place_of_the_first_stage(copy):
    """Then a stage that pastes by its maps."""
    checkpoint = copy / 'run' / 'stage1' / 'epoch_1.pth'
    config = second_config(copy, 'lws', mode='keep')
    words = (TOOL, checkpoint, config, copy / 'cam.py', '--work-dir', 'lws')
    done = run_tool(*words, '--cam-method', 'gradcam', cwd=copy)
    assert done.returncode == 0, done.stderr
    run = copy / 'lws'
    assert not (run / 'stage1').exists()
    assert changed(checkpoint, run / 'stage2' / 'epoch_1.pth') == NAMES
    (maps,) = run.glob('stage2-gradcam-*.cams')
    assert len(CAMFile(maps)) == 16
    assert changed(run / 'stage2' / 'epoch_1.pth', run / 'stage3' / 'epoch_1.pth') > NAMES


@pytest.mark.parametrize(
    ('trainable', 'part'),
    [('roi_head.bbox_head.fc_clz', 'FreezeHook.trainable'), ('nothing', 'nearest names')],
)
def test_wrong_patterns_stop_before_stage_1(recipe, tmp_path, call, trainable, part):
    config = second_config(recipe, 'wrong', trainable)
    words = (recipe / 'first.py', config, '--work-dir', tmp_path / 'run')
    status, lines = call('train_stages', *words)
    assert status == 2 and len(lines) == 1 and part in lines[0] and trainable in lines[0]
    assert not (tmp_path / 'run').exists()


def test_bad_input_stops_before_stage_1(recipe, tmp_path, call):
    first, crt, out = recipe / 'first.py', recipe / 'crt.py', ('--work-dir', tmp_path / 'x')
    lost = (
        "test_evaluator['ann_file'] = 'no'",
        "train_dataloader['dataset']['ann_file'] = 'n.json'",
    )
    text = (recipe / 'crt.py').read_text()
    (tmp_path / 'lost.py').write_text('\n'.join((text, *lost)))
    for words, part in (
        ((tmp_path / 'no.py', crt), 'no.py expected'),
        ((first, crt, tmp_path / 'no.py'), 'no.py expected'),
        ((tmp_path / 'no.pth', crt), 'no.pth (stage 1)'),
        ((first,), 'at least two stages'),
        ((first, tmp_path / 'lost.py'), 'n.json expected, found nothing'),
        ((first, crt, '--amp'), '--amp'),
        ((first, crt, '--auto-scale-lr'), 'auto_scale_lr.enable'),
        ((first, crt, '--cfg-options', 'load_from=no.pth'), 'no.pth (load_from of stage 1)'),
        (('a.pth', crt, '--cfg-options', 'load_from=b.pth'), 'leave one of them out'),
    ):
        status, lines = call('train_stages', *words, *out)
        assert status == 2 and len(lines) == 1 and part in lines[0], lines
    assert not (tmp_path / 'x').exists()


def test_options_reach_the_stages(recipe, tmp_path, monkeypatch, call):
    """All options go to every stage, but only the first starts where the command line says."""
    tool, given = load_tool('train_stages'), []
    monkeypatch.setattr(tool, 'run_stages', lambda *words: given.append(words))
    start, out = str(recipe / 'run' / 'stage1' / 'epoch_1.pth'), str(tmp_path / 'x')
    words = [str(recipe / 'first.py'), str(recipe / 'crt.py'), '--work-dir', out]
    options = ['--cfg-options', f'load_from={start}', 'train_cfg.max_epochs=7']
    tool.main([*words, *options, '--cam-method', 'gradcam', '--overwrite'])
    ((stages, _, *rest),) = given
    assert [stage.config.get('load_from') for stage in stages] == [start, None]
    assert [stage.config.train_cfg.max_epochs for stage in stages] == [7, 7]
    assert [stage.config.work_dir for stage in stages] == [f'{out}/stage1', f'{out}/stage2']
    assert rest == ['gradcam', True]


@pytest.mark.parametrize(
    ('words', 'part'),
    [
        (('dist', 'a.py', 'b.py'), 'usage: dist_train_stages.sh STAGE1 STAGE2 [STAGE3 ...] GPUS'),
        (('dist', 'a.py', 'b.py', '--work-dir', 'run'), 'found 2; usage'),
        (('dist', 'a.py', 'b.py', 'c.py'), "GPUS should be a whole number above 0, found 'c.py'"),
        (('dist',), 'found 0; usage'),
        (('slurm', 'part', 'job', 'a.py', 'run'), 'usage: slurm_train_stages.sh PARTITION JOB'),
    ],
)
def test_the_scripts_say_how_they_are_used(words, part, tmp_path):
    done = run_tool(f'tools/{words[0]}_train_stages.sh', *words[1:], cwd=tmp_path)
    assert done.returncode == 2 and part in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_slurm_script_hands_everything_on(tmp_path):
    (tmp_path / 'bin').mkdir()
    srun = tmp_path / 'bin' / 'srun'
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" > arguments\n')
    srun.chmod(0o755)
    path = f'{srun.parent}{os.pathsep}{os.environ["PATH"]}'
    words = ('part', 'job', 'a.py', 'b.py', 'c.py', 'run', '--overwrite', '--cfg-options', 'x=1')
    done = run_tool('tools/slurm_train_stages.sh', *words, cwd=tmp_path, PATH=path, GPUS='2')
    assert done.returncode == 0, done.stderr
    found = (tmp_path / 'arguments').read_text().splitlines()
    assert {'--partition=part', '--job-name=job', '--ntasks=2'} <= {*found}
    start = next(k for k, word in enumerate(found) if word.endswith('train_stages.py'))
    rest = ['a.py', 'b.py', 'c.py', '--work-dir', 'run', *words[-3:], '--launcher', 'slurm']
    assert found[start + 1 :] == rest


@pytest.mark.slow
def test_two_ranks(recipe, tmp_path):
    """The wrapper of a frozen model waits for no gradient that never comes, and maps are extracted
    by both ranks; then all is reused."""
    configs = [recipe / name for name in ('first.py', 'crt.py', 'cam.py')]
    words = ('tools/dist_train_stages.sh', *configs, '2', '--work-dir', 'run')
    done = run_tool(*words, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr and done.stdout.count('All stages are trained') == 1
    run = tmp_path / 'run'
    assert changed(run / 'stage1' / 'epoch_1.pth', run / 'stage2' / 'epoch_1.pth') == NAMES
    (maps,) = run.glob('stage2-hirescam-*.cams')
    assert len(CAMFile(maps)) == 16
    before = times(tmp_path)
    assert len(before) == 3
    done = run_tool(*words, cwd=tmp_path, timeout=400)
    assert done.returncode == 0 and 'Stage 3 is finished' in done.stdout, done.stderr
    assert times(tmp_path) == before
    # What the first rank alone looks at is refused on both, and said once.
    (run / 'stage1' / 'stage.json').unlink()
    done = run_tool(*words, cwd=tmp_path, timeout=400)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.count('error: ') == 1 and 'begun by another tool' in done.stderr


@pytest.mark.slow
def test_maps_for_two_ranks_before_anything_is_trained(recipe, tmp_path):
    """With a checkpoint as first stage the ranks meet for the maps."""
    checkpoint = recipe / 'run' / 'stage1' / 'epoch_1.pth'
    words = ('tools/dist_train_stages.sh', checkpoint, recipe / 'cam.py', '2')
    done = run_tool(*words, '--work-dir', 'run', cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr
    (maps,) = tmp_path.glob('run/stage1-hirescam-*.cams')
    assert len(CAMFile(maps)) == 16 and (tmp_path / 'run/stage2/epoch_1.pth').is_file()
