"""Comparing configs, and protecting the results of an earlier run."""

from __future__ import annotations

import os

import pytest

pytest.importorskip('mmdet')

import torch
from mmengine.config import Config

from mmdet_lt.engine import checkpoints, config_diff, work_dir
from mmdet_lt.errors import InputError

CONFIG = dict(
    model=dict(type='M', head=dict(num_classes=3, init_cfg=None), test_cfg=dict(score_thr=0.1)),
    train_dataloader=dict(
        batch_size=2,
        dataset=dict(
            type='W',
            dataset=dict(type='D', metainfo=dict(classes=('a', 'b')), pipeline=[dict(type='L')]),
        ),
    ),
    train_cfg=dict(max_epochs=2),
    work_dir='here',
)


def changed(**keys):
    cfg = Config(CONFIG)
    cfg.merge_from_dict(keys)
    return cfg.to_dict()


def save_run(folder, name='epoch_1.pth', with_config=True, **keys):
    folder.mkdir(exist_ok=True)
    meta = dict(epoch=1, iter=4)
    if with_config:
        meta['cfg'] = Config(changed(**keys)).pretty_text
    torch.save(dict(meta=meta, message_hub={}, state_dict={}), folder / name)
    (folder / 'last_checkpoint').write_text(str(folder / name))
    return folder / name


def test_dumped_text_equals_the_config():
    values = dict(
        a=[(1, 2), [3.5, None]],
        b={'not-a-name': 'it\'s "quoted"', 'x': -1e-5},
        c=[[dict(type='A', scale=(1, 2))], []],
        d=float('inf'),
        e=dict(),
        f='two\nlines',
        g=True,
    )
    cfg = Config(values)
    parsed = config_diff.parse_dumped(cfg.pretty_text)
    assert config_diff.differences(parsed, cfg.to_dict()) == {}
    assert parsed['b']['x'] == -1e-5
    other = config_diff.differences(parsed, {**values, 'g': False, 'h': 1})
    assert other == {'g': (True, False), 'h': (config_diff.MISSING, 1)}


def test_dumped_text_is_never_run(tmp_path):
    text = f'import os\nos.mkdir({str(tmp_path / "x")!r})\na = os.getcwd()\nb = 1\n'
    assert config_diff.parse_dumped(text) == {'a': 'os.getcwd()', 'b': 1}
    assert not (tmp_path / 'x').exists()


@pytest.mark.parametrize(
    ('key', 'harmful'),
    [
        ('model.type', True),
        ('model.backbone.depth', True),
        ('model.roi_head.bbox_head.0.num_classes', True),
        ('data_preprocessor.mean', True),
        ('model.test_cfg.rcnn.score_thr', False),
        ('model.backbone.init_cfg.checkpoint', False),
        ('train_dataloader.dataset.type', True),
        ('train_dataloader.dataset.metainfo.classes', True),
        ('train_dataloader.dataset.dataset.metainfo.classes', True),
        ('train_dataloader.dataset.datasets.1.type', True),
        ('train_dataloader.dataset.pipeline.0.type', False),
        ('train_dataloader.dataset.ann_file', False),
        ('train_dataloader.batch_size', False),
        ('train_cfg.max_epochs', False),
        ('model_wrapper_cfg.type', False),
        ('default_hooks.logger.interval', False),
    ],
)
def test_harmful_keys(key, harmful):
    assert config_diff.is_harmful(key) is harmful


def test_an_empty_work_directory_is_free(tmp_path):
    work_dir.check_new_run(tmp_path / 'new', CONFIG)
    (tmp_path / 'M.py').write_text(Config(CONFIG).pretty_text)  # dumped, but nothing saved
    work_dir.check_new_run(tmp_path, CONFIG)
    file = tmp_path / 'file'
    file.touch()
    with pytest.raises(InputError, match='found a file'):
        work_dir.check_new_run(file, CONFIG)


def test_new_run_on_top_of_another(tmp_path):
    save_run(tmp_path / 'run')
    with pytest.raises(InputError, match='same config, epoch_1.pth .* --resume'):
        work_dir.check_new_run(tmp_path / 'run', changed(work_dir='elsewhere', launcher='pytorch'))
    with pytest.raises(InputError, match=r'`train_cfg.max_epochs` was 2 and is now 9'):
        work_dir.check_new_run(tmp_path / 'run', changed(**{'train_cfg.max_epochs': 9}))
    both = {'train_cfg.max_epochs': 9, 'model.head.num_classes': 4}
    with pytest.raises(InputError, match=r'`model.head.num_classes` was 3 and is now 4'):
        work_dir.check_new_run(tmp_path / 'run', changed(**both))
    work_dir.forget_earlier_run(tmp_path / 'run')
    with pytest.raises(InputError, match='epoch_1.pth'):
        work_dir.check_new_run(tmp_path / 'run', CONFIG)


def test_dumped_config_is_used_where_the_checkpoint_has_none(tmp_path):
    save_run(tmp_path / 'run', with_config=False)
    assert work_dir.earlier_config(tmp_path / 'run') is None
    with pytest.raises(InputError, match='of an earlier run, '):
        work_dir.check_new_run(tmp_path / 'run', CONFIG)
    for age, (name, depth) in enumerate([('new.py', 50), ('old.py', 18)]):
        path = tmp_path / 'run' / name
        path.write_text(Config(changed(**{'model.depth': depth})).pretty_text)
        os.utime(path, (1000 - age, 1000 - age))
    assert work_dir.earlier_config(tmp_path / 'run')['model']['depth'] == 50
    with pytest.raises(InputError, match='`model.depth` was 50 and is now absent'):
        work_dir.find_resume('auto', tmp_path / 'run', CONFIG)


def test_resume(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(work_dir, 'print_log', lambda text, *_, **__: said.append(text))
    run = tmp_path / 'run'
    assert work_dir.find_resume('auto', run, CONFIG) is None
    assert 'from scratch' in said.pop()
    path = save_run(run)
    assert work_dir.find_resume('auto', run, CONFIG) == str(path)
    assert work_dir.find_resume(str(path), tmp_path / 'new', CONFIG) == str(path)
    assert said == []
    harmless = {'train_cfg.max_epochs': 9, 'train_dataloader.batch_size': 4}
    assert work_dir.find_resume('auto', run, changed(**harmless)) == str(path)
    assert 'train_cfg.max_epochs` was 2 and is now 9' in said.pop()
    for key, value in {
        'model.head.num_classes': 4,
        'train_dataloader.dataset.dataset.metainfo.classes': ('a', 'c'),
    }.items():
        with pytest.raises(InputError, match=f'cannot resume.*`{key}` was'):
            work_dir.find_resume('auto', run, changed(**{key: value}))


def test_resume_into_the_directory_of_another_run(tmp_path):
    path = save_run(tmp_path / 'mine')
    save_run(tmp_path / 'other', **{'model.type': 'N'})
    with pytest.raises(InputError, match="work directory .*other.* `model.type` was 'N'"):
        work_dir.find_resume(str(path), tmp_path / 'other', CONFIG)


def test_moved_and_lost_checkpoints(tmp_path):
    save_run(tmp_path / 'run')
    moved = (tmp_path / 'run').rename(tmp_path / 'moved')
    assert work_dir.find_resume('auto', moved, CONFIG) == str(moved / 'epoch_1.pth')
    (moved / 'epoch_1.pth').unlink()
    with pytest.raises(InputError, match='epoch_1.pth .* found nothing'):
        work_dir.find_resume('auto', moved, CONFIG)
    save_run(moved)
    (moved / 'last_checkpoint').unlink()
    with pytest.raises(InputError, match='no file last_checkpoint, but epoch_1.pth'):
        work_dir.find_resume('auto', moved, CONFIG)


def test_a_note_that_a_killed_run_left_empty(tmp_path):
    folder = tmp_path / 'run'
    save_run(folder)
    (folder / 'last_checkpoint').write_text('')
    assert work_dir.last_checkpoint(folder) == folder / 'epoch_1.pth'
    (folder / 'epoch_1.pth').unlink()
    assert work_dir.last_checkpoint(folder) is None


def test_remote_checkpoints_are_left_to_mmengine(tmp_path, monkeypatch):
    for address in ('https://x.y/a.pth', 'torchvision://resnet50', 'open-mmlab://x', 's3://a/b'):
        assert checkpoints.is_remote(address)
        checkpoints.check_checkpoint(address, 'load_from')
    monkeypatch.chdir(tmp_path)
    assert not checkpoints.is_remote('work_dirs/epoch_1.pth')


def test_legacy_and_foreign_checkpoints(tmp_path):
    """Files from before the zip format work; a foreign class is for mmengine's loader to judge."""
    path = tmp_path / 'x.pth'
    torch.save(dict(state_dict={}), path, _use_new_zipfile_serialization=False)
    checkpoints.check_checkpoint(path, 'load_from')
    whole = path.read_bytes()
    for size in range(1, len(whole), 7):
        path.write_bytes(whole[:size])
        if size < len(whole) // 2:
            with pytest.raises(InputError, match='truncated'):
                checkpoints.check_checkpoint(path, 'load_from')
    torch.save([1], path)
    with pytest.raises(InputError, match='should hold a dict, found list'):
        checkpoints.check_checkpoint(path, 'load_from')
    torch.save(dict(meta=argparse_namespace()), path)
    checkpoints.check_checkpoint(path, 'load_from', resume=True)


def argparse_namespace():
    import argparse

    return argparse.Namespace(a=1)
