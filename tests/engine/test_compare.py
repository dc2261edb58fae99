"""The comparison tool: equal lengths, reuse, tables; one real run from data to report."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mmengine.config import Config
from toy import make_toy_coco, write_toy_config

from mmdet_lt import ClassStatistics, InputError
from mmdet_lt.engine import compare as tool
from mmdet_lt.engine import compare_table
from mmdet_lt.visualization.predict import write_examples
from mmdet_lt.visualization.report import write_report

ROOT = Path(__file__).resolve().parents[2]
parse_labels = runpy.run_path(str(ROOT / 'tools/analysis/compare.py'))['parse_labels']


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


def toy_run(tmp_path, folder='data', extra='', metric='mmdet_lt.LVISMetric'):
    ann = make_toy_coco(tmp_path / folder, num_images=4)
    evaluator = f'dict(type={metric!r}, ann_file={str(ann)!r})'
    return write_toy_config(
        tmp_path / 'toy.py',
        tmp_path / folder,
        'faster_rcnn',
        extra=(
            "custom_imports = dict(imports=['mmdet_lt'])\n"
            "custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook', interval=1)]\n"
            'val_dataloader = test_dataloader\n'
            f'val_evaluator = {evaluator}\n'
            "val_cfg = dict(type='ValLoop')\n" + extra
        ),
        overrides={
            'model.roi_head.bbox_head.loss_cls': dict(
                _delete_=True, type='mmdet_lt.EQLv2Loss', use_sigmoid=True
            )
        },
    )


def test_a_run_from_data_to_report(tmp_path):
    config = toy_run(tmp_path)
    ann = tmp_path / 'data' / 'train.json'
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


def _result_of(results):
    (result,) = results
    return {k: v for k, v in result.items() if 'seconds' not in k}


@pytest.mark.slow
def test_equal_seeds_give_equal_runs_and_interruptions_change_nothing(tmp_path):
    config = toy_run(tmp_path)
    run = dict(seeds=[1], iters=8, progress=False)
    whole = tool.compare({'toy': config}, tmp_path / 'whole', **run)
    again = tool.compare({'toy': config}, tmp_path / 'again', **run)
    keys = [key for key in whole[0] if '/' in key]
    assert keys and [whole[0][k] for k in keys] == [again[0][k] for k in keys]

    # Killed between the last iteration and the end of its evaluation: no metric was logged.
    folder = tmp_path / 'again' / 'toy' / 'seed1'
    (folder / 'result.json').unlink()
    for log in folder.rglob('scalars.json'):
        lines = [line for line in log.read_text().splitlines() if '"loss"' in line]
        log.write_text('\n'.join(lines))
    resumed = tool.compare({'toy': config}, tmp_path / 'again', **run)
    assert _result_of(resumed) == _result_of(again)


@pytest.mark.slow
def test_killed_comparisons_go_on(tmp_path):
    """``kill -9`` of the comparison leaves its training alive; the next one waits for it."""
    config = toy_run(tmp_path)
    command = [sys.executable, str(ROOT / 'tools/analysis/compare.py'), str(config)]
    command += ['--seeds', '1', '--iters', '30', '--out', str(tmp_path / 'out')]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / 'out' / 'toy' / 'seed0'
    while process.poll() is None and not list(folder.glob('iter_*.pth')):
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not (folder / 'result.json').exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'waiting for the training' in done.stderr + done.stdout
    killed = json.loads((folder / 'result.json').read_text())
    whole = tool.compare({'toy': config}, tmp_path / 'whole', [0], iters=30, progress=False)
    assert killed['lvis/bbox_AP'] == whole[0]['lvis/bbox_AP']
    assert (tmp_path / 'out' / 'bbox_AP.png').read_bytes()[:4] == b'\x89PNG'


def test_results_of_another_config_are_kept(tmp_path):
    config = tmp_path / 'a.py'
    config.write_text("model = dict(type='Nothing')\ntrain_cfg = dict(max_iters=1)\n")
    folder = tmp_path / 'out' / 'a' / 'seed0'
    folder.mkdir(parents=True)
    (folder / 'result.json').write_text(json.dumps(dict(fingerprint='other', iters=1)))
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(InputError, match=r'seed0 holds a run of another config.*`--out`'):
        tool.compare({'a': config}, tmp_path / 'out', [0], progress=False)
    assert sorted(p.name for p in folder.iterdir()) == before
    with pytest.raises(InputError, match='status 2'):  # its own failure: the folder was free
        tool.compare({'a': config}, tmp_path / 'out', [0], progress=False, overwrite=True)
    assert not (folder / 'result.json').exists()
    stray = tmp_path / 'out' / 'a' / 'seed1'
    stray.mkdir()
    (stray / 'epoch_1.pth').write_text('weights of somebody')
    with pytest.raises(InputError, match='seed1 holds a run'):
        tool.compare({'a': config}, tmp_path / 'out', [1], progress=False)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(seeds=[]), '--seeds'),
        (dict(jobs=0), '--jobs'),
        (dict(iters=0), '--iters'),
        (dict(iters=-3), '--iters'),
    ],
)
def test_impossible_settings_are_refused(tmp_path, options, message):
    config = tmp_path / 'a.py'
    config.write_text('train_cfg = dict(max_iters=1)\n')
    with pytest.raises(InputError, match=message):
        tool.compare({'a': config}, tmp_path / 'out', **dict(dict(seeds=[0]), **options))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('text', 'message'), [('train_cfg = (', 'cannot be read'), ('a = 1', 'key `train_cfg`')]
)
def test_unreadable_configs_are_refused_before_anything_trains(tmp_path, text, message):
    config = tmp_path / 'a.py'
    config.write_text(text)
    with pytest.raises(InputError, match=f"a.py of 'a'.*{message}"):
        tool.compare({'a': config}, tmp_path / 'out')


def test_labels_name_folders():
    assert parse_labels(['x/a.py', 'b=x=y/a.py']) == {'a': 'x/a.py', 'b': 'x=y/a.py'}
    with pytest.raises(InputError, match=r"x/a\.py and y/a\.py have the same label 'a'"):
        parse_labels(['x/a.py', 'y/a.py'])
    for item in ('a/b=c.py', '..=c.py'):
        with pytest.raises(InputError, match='name of a folder'):
            parse_labels([item])


def test_metric_of_the_plot_follows_the_data_set():
    def of(key):
        return compare_table.main_metric([{'label': 'a', 'seed': 0, 'time': 1, key: 0.5}])

    assert of('lvis/bbox_AP') == 'bbox_AP' and of('coco/bbox_mAP') == 'bbox_mAP'
    assert of('pascal_voc/mAP') == 'mAP' and of('my/score') == 'my/score'
    with pytest.raises(InputError, match='no run has a metric'):
        of('seconds')


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
    assert cells[0] == ['recipe', 'iterations', 'seeds', 'mAP', 'mAP50', 'seconds']
    assert cells[2] == ['a', '10', '2 (1 failed)', '25.0', '50.0', '5']
    assert cells[3] == ['b', '10', '1 (1 failed)', 'failed', 'failed', 'failed']
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
