"""The comparison tool: equal lengths, reuse, tables; one real run from data to report."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config
from toy import make_toy_coco, write_toy_config

from mmdet_lt import ClassStatistics, InputError
from mmdet_lt.engine import compare as tool
from mmdet_lt.engine import compare_table
from mmdet_lt.visualization.predict import write_examples
from mmdet_lt.visualization.report import write_report


def test_epoch_schedules_become_iteration_schedules():
    cfg = Config(
        dict(
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=12),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
                dict(type='MultiStepLR', begin=0, end=12, milestones=[8, 11], by_epoch=True),
            ],
        )
    )
    tool.set_iterations(cfg, 1200)
    assert cfg.train_cfg.max_iters == cfg.train_cfg.val_interval == 1200
    warmup, steps = cfg.param_scheduler
    assert (warmup.end, steps.end, steps.milestones) == (500, 1200, [800, 1100])
    assert not steps.by_epoch
    assert cfg.default_hooks.checkpoint.by_epoch is False


def test_iteration_schedules_are_scaled():
    cfg = Config(
        dict(
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=1000),
            param_scheduler=[dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=1000)],
        )
    )
    tool.set_iterations(cfg, 200)
    assert (cfg.param_scheduler[0].begin, cfg.param_scheduler[0].end) == (20, 200)
    with pytest.raises(InputError, match='--iters'):
        tool.set_iterations(cfg, 0)


def test_table_shows_mean_and_spread():
    def result(label, seed, ap):
        metrics = {f'lvis/bbox_{k}': ap for k in ('AP', 'AP50', 'APr', 'APc', 'APf')}
        return dict(label=label, seed=seed, iters=10, seconds=5.0, **metrics)

    text = compare_table.table([result('a', 0, 0.25), result('a', 1, 0.35), result('b', 0, 0.5)])
    lines = [[c.strip() for c in line.split('|')[1:-1]] for line in text.splitlines()]
    assert lines[2][:4] == ['a', '10', '2', '30.0 ± 7.1']
    assert lines[3][:4] == ['b', '10', '1', '50.0']


def test_unequal_lengths_are_refused(tmp_path):
    paths = {}
    for name, iters in (('a', 10), ('b', 20)):
        paths[name] = tmp_path / f'{name}.py'
        paths[name].write_text(f'train_cfg = dict(max_iters={iters})\n')
    with pytest.raises(InputError, match='equally long'):
        tool.compare(paths, tmp_path / 'out')
    with pytest.raises(InputError, match='does not exist'):
        tool.compare({'c': tmp_path / 'c.py'}, tmp_path / 'out')


def test_a_run_from_data_to_report(tmp_path):
    ann = make_toy_coco(tmp_path / 'data', num_images=4)
    evaluator = f"dict(type='mmdet_lt.LVISMetric', ann_file={str(ann)!r})"
    config = write_toy_config(
        tmp_path / 'toy.py',
        tmp_path / 'data',
        'faster_rcnn',
        extra=(
            "custom_imports = dict(imports=['mmdet_lt'])\n"
            "custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook', interval=1)]\n"
            'val_dataloader = test_dataloader\n'
            f'val_evaluator = {evaluator}\n'
            "val_cfg = dict(type='ValLoop')\n"
        ),
        overrides={
            'model.roi_head.bbox_head.loss_cls': dict(
                _delete_=True, type='mmdet_lt.EQLv2Loss', use_sigmoid=True
            )
        },
    )
    out = tmp_path / 'out'
    results = tool.compare({'toy': config}, out, [0], iters=3, progress=False)
    folder = out / 'toy' / 'seed0'
    assert results[0]['iters'] == 3 and 0 <= results[0]['lvis/bbox_AP'] <= 1
    assert json.loads((folder / 'lvis_detail.json').read_text())['bbox']['classes']
    checkpoint = Path((folder / 'last_checkpoint').read_text().strip())
    assert checkpoint.name == 'iter_3.pth'

    # A finished run is reused; an unfinished one is not.
    before = checkpoint.stat().st_mtime_ns
    assert tool.compare({'toy': config}, out, [0], iters=3, progress=False) == results
    assert checkpoint.stat().st_mtime_ns == before

    stats = ClassStatistics.from_file(ann)
    write_examples(folder / 'config.py', checkpoint, folder / 'examples.json', stats, 2, 0.0)
    examples = json.loads((folder / 'examples.json').read_text())
    assert len(examples) == 2 and all(e['gt'] and e['pred'] for e in examples)
    page = write_report({'toy': folder}, out / 'report.html', stats).read_text()
    assert 'data:image/png;base64' in page and 'toy' in page


def test_a_failing_run_says_where_its_log_is(tmp_path):
    config = tmp_path / 'bad.py'
    config.write_text(
        "model = dict(type='Nothing')\ntrain_cfg = dict(max_iters=1)\nval_evaluator = None\n"
    )
    with pytest.raises(InputError, match=r'status 2: error: .*train\.log'):
        tool.compare({'bad': config}, tmp_path / 'out', [0], progress=False)


def _results():
    def result(label, seed, **metrics):
        return dict(label=label, seed=seed, iters=10, seconds=5.0, **metrics)

    return [
        result('a', 0, **{'coco/bbox_mAP': 0.25, 'coco/bbox_mAP_50': 0.5}),
        dict(label='a', seed=1, iters=10, failed='loss is nan (log: x)'),
        dict(label='b', seed=0, iters=10, failed='out of memory'),
    ]


def test_failed_runs_are_in_the_table():
    lines = compare_table.table(_results(), 'coco/bbox_mAP').splitlines()
    cells = [[c.strip() for c in line.split('|')[1:-1]] for line in lines[:4]]
    assert cells[0] == ['recipe', 'iterations', 'seeds', 'coco/bbox_mAP', 'seconds']
    assert cells[2] == ['a', '10', '2 (1 failed)', '0.2', '5']
    assert cells[3] == ['b', '10', '1 (1 failed)', 'failed', 'failed']
    assert lines[5:] == [
        '- failed: a, seed 1: loss is nan (log: x)',
        '- failed: b, seed 0: out of memory',
    ]


def test_plot_and_unknown_metric(tmp_path):
    compare_table.plot(_results(), tmp_path / 'plot.png', 'bbox_mAP_50')
    assert (tmp_path / 'plot.png').read_bytes()[:4] == b'\x89PNG'
    with pytest.raises(InputError, match=r"one of \['coco/bbox_mAP', .*found 'bbox_APx'"):
        compare_table.plot(_results(), tmp_path / 'plot.png', 'bbox_APx')


def test_a_failing_run_leaves_the_others(tmp_path, monkeypatch):
    paths = {}
    for name in 'abc':
        paths[name] = tmp_path / f'{name}.py'
        paths[name].write_text('train_cfg = dict(max_iters=1)\n')

    def execute(run, *_args):
        if run.label == 'b':
            raise InputError('loss is nan')
        return dict(label=run.label, seed=run.seed)

    monkeypatch.setattr(tool, 'execute', execute)
    results = tool.compare(paths, tmp_path / 'out', [0], progress=False)
    assert [r.get('failed') for r in results] == [None, 'loss is nan', None]
    with pytest.raises(InputError, match='loss is nan'):
        tool.compare({'b': paths['b']}, tmp_path / 'out', [0, 1], progress=False)
