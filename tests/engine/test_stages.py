"""Recipes of several stages: hand-over, resume, refusal, class activation maps in between."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_lt import InputError
from mmdet_lt.engine import stages as tool


def write_config(path, sampler="dict(type='DefaultSampler')", extra=''):
    path.write_text(f'train_dataloader = dict(sampler={sampler})\n{extra}')
    return path


@pytest.fixture
def started(monkeypatch):
    """Commands that would have been run; training leaves a checkpoint, extraction a file."""
    commands = []

    def run(command, nproc, what):
        commands.append((Path(command[0]).name, command[1:], nproc))
        if command[0].endswith('train.py'):
            folder = Path(Config.fromfile(command[1]).work_dir)
            checkpoint = folder / 'iter_1.pth'
            checkpoint.write_bytes(Path(command[1]).read_bytes())
            (folder / 'last_checkpoint').write_text(str(checkpoint))
        else:
            Path(command[command.index('--out') + 1]).write_text('maps')

    monkeypatch.setattr(tool, '_run', run)
    return commands


def test_each_stage_starts_from_the_one_before(tmp_path, started):
    configs = [write_config(tmp_path / f'{k}.py') for k in 'abc']
    last = tool.run_stages(tool.load_stages(configs, tmp_path / 'out'))
    assert last == tmp_path / 'out/stage3/iter_1.pth'
    loaded = [Config.fromfile(command[1][0]).get('load_from') for command in started]
    assert loaded == [None, *(str(tmp_path / f'out/stage{k}/iter_1.pth') for k in (1, 2))]
    # The same command again has nothing to do.
    tool.run_stages(tool.load_stages(configs, tmp_path / 'out'))
    assert len(started) == 3


def test_a_killed_stage_is_resumed_and_another_recipe_refused(tmp_path, started):
    configs = [write_config(tmp_path / f'{k}.py') for k in 'ab']
    tool.run_stages(tool.load_stages(configs, tmp_path / 'out'))
    note = tmp_path / 'out/stage2/stage.json'
    note.write_text(json.dumps(dict(json.loads(note.read_text()), checkpoint=None)))
    tool.run_stages(tool.load_stages(configs, tmp_path / 'out'))
    assert started[-1][1][1:] == ['--resume'] and len(started) == 3
    write_config(configs[1], extra='seed = 1\n')
    with pytest.raises(InputError, match='stage 2 of another recipe'):
        tool.run_stages(tool.load_stages(configs, tmp_path / 'out'))
    tool.run_stages(tool.load_stages(configs, tmp_path / 'out'), overwrite=True)
    assert started[-1][1][1:] == ['--overwrite'] and len(started) == 4


def test_another_first_stage_makes_the_second_another_recipe(tmp_path, started):
    configs = [write_config(tmp_path / f'{k}.py') for k in 'ab']
    tool.run_stages(tool.load_stages(configs, tmp_path / 'out'))
    write_config(configs[0], extra='seed = 1\n')
    tool.run_stages(tool.load_stages(configs, tmp_path / 'out'), overwrite=True)
    assert len(started) == 4  # both again


def test_maps_are_extracted_between_stages(tmp_path, started):
    sampler = "dict(type='mmdet_lt.CAMSampler')"
    configs = [write_config(tmp_path / 'a.py'), write_config(tmp_path / 'b.py', sampler)]
    for _ in range(2):
        tool.run_stages(tool.load_stages(configs, tmp_path / 'out'), nproc=2)
    assert [(name, nproc) for name, _, nproc in started] == [
        ('train.py', 2),
        ('extract_cams.py', 2),
        ('train.py', 2),
    ]
    chosen = Config.fromfile(started[-1][1][0]).train_dataloader.sampler
    assert Path(chosen.cams).read_text() == 'maps'
    assert chosen.checkpoint == str(tmp_path / 'out/stage1/iter_1.pth')
    tool.run_stages(tool.load_stages(configs, tmp_path / 'out'), 2, 'gradcam', overwrite=True)
    assert started[3][0] == 'extract_cams.py' and 'gradcam' in started[3][1]


def test_maps_from_annotations_need_no_extraction(tmp_path, started):
    sampler = "dict(type='mmdet_lt.CAMSampler', mask_source='mask')"
    configs = [write_config(tmp_path / 'a.py', sampler), write_config(tmp_path / 'b.py', sampler)]
    tool.run_stages(tool.load_stages(configs, tmp_path / 'out'))
    assert {name for name, *_ in started} == {'train.py'}


def test_bad_recipes(tmp_path):
    config = write_config(tmp_path / 'a.py')
    with pytest.raises(InputError, match='at least two stages'):
        tool.load_stages([config], tmp_path)
    with pytest.raises(InputError, match='stage 2 does not exist'):
        tool.load_stages([config, tmp_path / 'no.py'], tmp_path)
    cam = write_config(tmp_path / 'c.py', "dict(type='mmdet_lt.CAMSampler')")
    with pytest.raises(InputError, match='stage 1.*class activation maps'):
        tool.load_stages([cam, config], tmp_path)


def test_a_failed_stage_names_itself(tmp_path):
    with pytest.raises(InputError, match='stage 7 stopped with status 3'):
        tool._run(['-c', 'import sys; sys.exit(3)'], 1, 'stage 7')
