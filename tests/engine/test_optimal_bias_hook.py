"""Measured priors: equal to counts by hand, cached, resumed, refused; uncertainty without decay."""

import json
import os

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from row_oracle import by_assigner, loader_of, model_of
from sampling_free_toy import build, run_config, train
from toy import make_toy_coco, toy_config

from mmdet_lt import InputError
from mmdet_lt.engine.hooks import optimal_bias_hook
from mmdet_lt.engine.hooks._prior_marks import data_mark, detector_mark
from mmdet_lt.models.layers.optimal_bias import optimal_prior, sigmoid_bias


@pytest.fixture
def data(tmp_path):
    make_toy_coco(tmp_path / 'data', num_images=5)
    return tmp_path / 'data'


def bias_before_training(cfg):
    """The classifier's bias and the counts as the first iteration finds them."""
    runner = Runner.from_cfg(cfg)
    seen = {}

    def record(*_args, **_kwargs):
        seen.update({k: v.detach().clone() for k, v in runner.model.state_dict().items()})
        raise KeyboardInterrupt

    runner.model.train_step = record
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    return seen


def test_the_hook_sets_the_bias_and_remembers(data, tmp_path, monkeypatch):
    cfg = run_config(data, tmp_path / 'a', 'RetinaNet')
    seen = bias_before_training(cfg)
    rows = seen['sampling_free.prior.rows_bbox_head'].tolist()
    model = model_of('RetinaNet')
    assert rows == by_assigner('RetinaNet', model, loader_of(data))
    bias = sigmoid_bias(optimal_prior(sum(rows[:-1]), sum(rows), 3))
    got = seen['bbox_head.retina_cls.bias']
    torch.testing.assert_close(got, torch.full_like(got, bias))
    saved = json.loads((tmp_path / 'a' / 'optimal_prior.json').read_text())
    assert saved['rows'] == {'bbox_head': rows}

    def forbidden(*_args):
        raise AssertionError('measured again')

    # The cache serves equal runs, wherever the data lie; the file can be named, too.
    monkeypatch.setattr(optimal_bias_hook, 'count_rows', forbidden)
    (tmp_path / 'moved').mkdir()
    os.rename(data, tmp_path / 'moved' / 'data')
    moved = tmp_path / 'moved' / 'data'
    again = bias_before_training(run_config(moved, tmp_path / 'b', 'RetinaNet'))
    assert torch.equal(again['bbox_head.retina_cls.bias'], got)
    named = str(tmp_path / 'a' / 'optimal_prior.json')
    given = run_config(moved, tmp_path / 'c', 'RetinaNet', dict(cache=False), prior=named)
    assert torch.equal(bias_before_training(given)['bbox_head.retina_cls.bias'], got)
    for change in (dict(hook=dict(cache=False)), dict(hook=dict(num_images=2))):
        with pytest.raises(AssertionError, match='measured again'):
            train(run_config(moved, tmp_path / 'd', 'RetinaNet', **change))


def test_a_prior_of_other_data_or_detector_is_refused(data, tmp_path):
    bias_before_training(run_config(data, tmp_path / 'a', 'RetinaNet'))
    named = str(tmp_path / 'a' / 'optimal_prior.json')
    other = tmp_path / 'other'
    make_toy_coco(other, num_images=5, seed=1)
    cfg = run_config(other, tmp_path / 'b', 'RetinaNet', prior=named)
    with pytest.raises(InputError, match=r'optimal_prior\.json was measured with other training'):
        train(cfg)
    cfg = run_config(data, tmp_path / 'c', 'RetinaNet', prior=named)
    cfg.model.train_cfg.assigner.pos_iou_thr = 0.6
    with pytest.raises(InputError, match='measured with another detector'):
        train(cfg)
    (tmp_path / 'x.json').write_text('{}')
    cfg = run_config(data, tmp_path / 'd', 'RetinaNet', prior=str(tmp_path / 'x.json'))
    with pytest.raises(InputError, match=r'x\.json.*is no file of a measured prior'):
        train(cfg)


def test_a_damaged_cache_is_measured_again(data, tmp_path):
    bias_before_training(run_config(data, tmp_path / 'a', 'RetinaNet'))
    (entry,) = (tmp_path / '.cache' / 'optimal_prior').glob('*.json')
    whole = entry.read_text()
    entry.write_text(whole[:40])
    bias_before_training(run_config(data, tmp_path / 'b', 'RetinaNet'))
    assert json.loads(entry.read_text()) == json.loads(whole)


@pytest.mark.parametrize(
    'change',
    [
        lambda cfg, path: cfg.merge_from_dict({'model.train_cfg.allowed_border': 0}),
        lambda cfg, path: (
            cfg.merge_from_dict({'model.bbox_head.anchor_generator.scales': [3]})
            or cfg.model.bbox_head.anchor_generator.update(
                octave_base_scale=None, scales_per_octave=None
            )
        ),
        lambda cfg, path: cfg.merge_from_dict({'model.backbone.strides': (2, 2, 2)}),
        lambda cfg, path: cfg.merge_from_dict({'model.data_preprocessor.pad_size_divisor': 64}),
        lambda cfg, path: cfg.train_dataloader.dataset.pipeline.insert(
            -1, dict(type='RandomFlip', prob=0.5)
        ),
        lambda cfg, path: cfg.train_dataloader.update(batch_size=1),
        lambda cfg, path: _move_one_box(path),
    ],
    ids=['border', 'anchors', 'backbone', 'padding', 'pipeline', 'batch', 'boxes'],
)
def test_what_counts_in_the_cache(data, tmp_path, monkeypatch, change):
    bias_before_training(run_config(data, tmp_path / 'a', 'RetinaNet'))

    def forbidden(*_args):
        raise AssertionError('measured again')

    monkeypatch.setattr(optimal_bias_hook, 'count_rows', forbidden)
    same = run_config(data, tmp_path / 'b', 'RetinaNet')
    same.model.backbone.with_cp = True
    same.randomness.seed = 5
    bias_before_training(same)  # what changes no row does not count
    cfg = run_config(data, tmp_path / 'c', 'RetinaNet')
    change(cfg, data / 'train.json')
    with pytest.raises(AssertionError, match='measured again'):
        train(cfg)


def _move_one_box(path):
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'][0] += 1
    path.write_text(json.dumps(content))


def test_boxes_outside_the_annotation_file_count_too(data):
    """VOC keeps them in files of their own: the records are what counts."""

    def mark(move):
        dataset = loader_of(data).dataset
        records = [dataset.get_data_info(index) for index in range(len(dataset))]
        records[0]['instances'][0]['bbox'][0] += move
        dataset.ann_file, dataset.data_list = '', records
        dataset.data_bytes, dataset.data_address = dataset._serialize_data()
        return data_mark(dataset, None)

    assert mark(0) == mark(0) != mark(1)


def test_a_runner_without_config_has_marks_of_its_own():
    """``Runner(model=...)`` keeps no config: two detectors must not share a cache entry."""
    first, same, other = (build(kind) for kind in ('RetinaNet', 'RetinaNet', 'ATSS'))
    border = build('RetinaNet')
    border.bbox_head.train_cfg.allowed_border = 0
    marks = [detector_mark(None, model) for model in (first, same, other, border)]
    assert marks[0] == marks[1] and len({tuple(mark) for mark in marks}) == 3


@pytest.mark.parametrize(
    'rows',
    [[], {'bbox_head': 3}, {'bbox_head': [1, 2, 'x', 4]}, {'bbox_head': [1, -2, 3, 4]}, None],
)
def test_rows_that_are_no_counts(data, tmp_path, rows):
    bias_before_training(run_config(data, tmp_path / 'a', 'RetinaNet'))
    named = tmp_path / 'a' / 'optimal_prior.json'
    content = json.loads(named.read_text())
    (entry,) = (tmp_path / '.cache' / 'optimal_prior').glob('*.json')
    for path in (named, entry):
        path.write_text(json.dumps(dict(content, rows=rows)))
    bias_before_training(run_config(data, tmp_path / 'b', 'RetinaNet'))  # measured again
    assert json.loads(entry.read_text()) == content
    cfg = run_config(data, tmp_path / 'c', 'RetinaNet', prior=str(named))
    with pytest.raises(InputError, match=r'optimal_prior\.json.*is damaged.*row counts'):
        train(cfg)


def test_resume_goes_on_as_if_unbroken(data, tmp_path):
    def schedule(cfg, epochs):
        cfg.train_cfg.max_epochs = epochs
        return cfg

    whole = train(schedule(run_config(data, tmp_path / 'whole', 'RetinaNet'), 2))
    train(schedule(run_config(data, tmp_path / 'parts', 'RetinaNet'), 1))
    cfg = schedule(run_config(data, tmp_path / 'parts', 'RetinaNet'), 2)
    cfg.update(resume=True, load_from=str(tmp_path / 'parts' / 'epoch_1.pth'))
    parts = train(cfg)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[key], value, rtol=0, atol=0, msg=key)
    assert whole.model.sampling_free.guide.steps == 6

    other = tmp_path / 'other'
    make_toy_coco(other, num_images=5, seed=1)
    cfg = schedule(run_config(other, tmp_path / 'parts', 'RetinaNet'), 3)
    cfg.update(resume=True, load_from=str(tmp_path / 'parts' / 'epoch_2.pth'))
    with pytest.raises(InputError, match='prior of the checkpoint was measured with other'):
        train(cfg)


def test_fine_tuning_keeps_a_trained_classifier_but_counts_anew(data, tmp_path):
    train(run_config(data, tmp_path / 'a', 'RetinaNet'))
    trained = torch.load(tmp_path / 'a' / 'epoch_1.pth', weights_only=False)['state_dict']
    other = tmp_path / 'other'
    make_toy_coco(other, num_images=3, seed=5)
    cfg = run_config(other, tmp_path / 'b', 'RetinaNet')
    cfg.load_from = str(tmp_path / 'a' / 'epoch_1.pth')
    seen = bias_before_training(cfg)
    key = 'bbox_head.retina_cls.bias'
    assert torch.equal(seen[key], trained[key])
    counts = seen['sampling_free.prior.rows_bbox_head'].tolist()
    assert counts == by_assigner('RetinaNet', model_of('RetinaNet'), loader_of(other))


def test_published_generation_leaves_the_roi_classifier(data, tmp_path):
    for generation, is_zero in (('2020', True), ('robust', False)):
        cfg = run_config(data, tmp_path / generation, 'FasterRCNN', generation=generation)
        seen = bias_before_training(cfg)
        assert (seen['roi_head.bbox_head.fc_cls.bias'] == 0).all() == is_zero
        assert seen['rpn_head.rpn_cls.bias'][0] < -1


def _decay_of(runner, parameter):
    groups = runner.optim_wrapper.param_groups
    return {g['weight_decay'] for g in groups for p in g['params'] if p is parameter}


@pytest.mark.parametrize(
    'paramwise', [None, dict(norm_decay_mult=0.0), dict(custom_keys={'head': dict(lr_mult=0.5)})]
)
def test_uncertainty_never_decays(data, tmp_path, paramwise):
    """Whatever the groups of the optimiser are; the other parameters keep their decay."""

    def config(name, epochs):
        cfg = run_config(data, tmp_path / name, 'RetinaNet', generation='2021')
        cfg.optim_wrapper.optimizer.weight_decay = 0.1
        cfg.optim_wrapper.paramwise_cfg = paramwise and ConfigDict(paramwise)
        cfg.param_scheduler.append(
            dict(type='PolyLR', power=1.0, by_epoch=False, begin=4, end=9, eta_min=1e-4)
        )
        cfg.train_cfg.max_epochs = epochs
        return cfg

    whole = train(config('whole', 2))
    sigma = whole.model.sampling_free.guide.log_sigma
    assert _decay_of(whole, sigma) == {0.0}
    assert _decay_of(whole, whole.model.bbox_head.retina_cls.weight) == {0.1}
    assert (sigma != 0).all()  # it learns
    groups = whole.optim_wrapper.param_groups
    rates = {(g['initial_lr'], g['lr']) for g in groups}
    assert len(rates) == (2 if paramwise and 'custom_keys' in paramwise else 1)  # one schedule
    optimised = [id(p) for g in groups for p in g['params'] if p.requires_grad]
    assert sorted(optimised) == sorted(id(p) for p in whole.model.parameters() if p.requires_grad)

    # The group is in the checkpoint: a resumed run goes on as the whole one.
    train(config('parts', 1))
    cfg = config('parts', 2)
    cfg.update(resume=True, load_from=str(tmp_path / 'parts' / 'epoch_1.pth'))
    parts = train(cfg)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(
            parts.model.state_dict()[key], value, rtol=0, atol=0, equal_nan=True, msg=key
        )


def test_data_without_objects_is_refused(data, tmp_path):
    path = data / 'train.json'
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(content, annotations=[])))
    cfg = run_config(data, tmp_path / 'a', 'RetinaNet')
    with pytest.raises(InputError, match=r'5 training images.*no object.*`model\.bbox_head`'):
        train(cfg)


def test_the_hook_needs_a_sampling_free_detector(data, tmp_path):
    cfg = toy_config(data)
    cfg.custom_hooks = [dict(type='mmdet_lt.OptimalBiasHook')]
    cfg.work_dir = str(tmp_path / 'a')
    with pytest.raises(InputError, match=r"found RetinaNet: set.*`model\.detector='RetinaNet'`"):
        train(cfg)
    for bad in (0, 1.5):
        with pytest.raises(InputError, match='num_images'):
            optimal_bias_hook.OptimalBiasHook(num_images=bad)


def test_nan_stops_the_run_with_usable_weights(data, tmp_path):
    cfg = run_config(data, tmp_path / 'a', 'RetinaNet')
    cfg.optim_wrapper.optimizer.lr = 1e30
    cfg.param_scheduler = []
    runner = Runner.from_cfg(cfg)
    with pytest.raises(InputError, match=r'every loss must be finite, but `loss_'):
        runner.train()
    guide = runner.model.sampling_free.guide
    assert torch.isfinite(guide.ratio).all() and torch.isfinite(guide.loc_mean).all()


@pytest.mark.parametrize(
    ('kind', 'loss'),
    [('RetinaNet', 'EQLv2Loss'), ('FasterRCNN', 'EQLv2Loss'), ('FasterRCNN', 'SeesawLoss')],
)
def test_it_combines_with_long_tail_losses_and_samplers(data, tmp_path, kind, loss):
    sigmoid = loss == 'EQLv2Loss'
    cfg = run_config(data, tmp_path / 'a', kind)
    head = cfg.model.bbox_head if kind == 'RetinaNet' else cfg.model.roi_head.bbox_head
    head.loss_cls = ConfigDict(type=f'mmdet_lt.{loss}', use_sigmoid=sigmoid)
    cfg.custom_hooks.insert(0, dict(type='mmdet_lt.ClassStatisticsHook'))
    cfg.train_dataloader.sampler = dict(type='mmdet_lt.RepeatFactorSampler', repeat_thr=0.5)
    seen = bias_before_training(cfg)
    # Measuring is no training: running statistics are still those of an untrained loss.
    running = {k: v for k, v in seen.items() if k.rpartition('.')[2] in ('pos_grad', 'cum_samples')}
    assert running and all((v == 0).all() for v in running.values())
    cfg.experiment_name += 'again'
    runner = train(cfg)
    assert runner.model.sampling_free.guide.steps == len(runner.train_dataloader)
    assert torch.isfinite(runner.model.sampling_free.guide.ratio).all()
