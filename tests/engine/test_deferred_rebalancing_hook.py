"""Deferred re-balancing: what is trained on either side, in both loops, with workers, resumed."""

import pytest
from mmdet.models.losses import CrossEntropyLoss
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.runner import Runner
from toy import make_toy_coco, toy_config

from mmdet_lt.engine.hooks import deferred_rebalancing_hook
from mmdet_lt.engine.hooks.deferred_rebalancing_hook import DeferredRebalancingHook
from mmdet_lt.errors import InputError
from mmdet_lt.registry import DATA_SAMPLERS, HOOKS, MODELS

IMAGES = 8
OURS, STOCK = 'mmdet_lt.IterBasedTrainLoop', 'IterBasedTrainLoop'

pytestmark = pytest.mark.usefixtures('plain_config_dumps')


@MODELS.register_module()
class SwitchableLoss(CrossEntropyLoss):
    """Says which side it is on; off it trains nothing, so that losses show it too."""

    active = None

    def set_rebalancing(self, active):
        self.active = active

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * (2.0 if self.active else 1.0)


@DATA_SAMPLERS.register_module()
class FakeSampler(DefaultSampler):
    """Image 0 only when re-balanced, the images in order when plain; counts its own positions."""

    def __init__(self, dataset, seed=None, shuffle=False):
        super().__init__(dataset, shuffle=False, seed=seed)
        self.calls, self.limit = [], 0

    def defer_until(self, epoch=None, num_samples=None):
        self.calls.append(dict(epoch=epoch, num_samples=num_samples))
        self.limit = epoch * len(self) if epoch is not None else num_samples

    def __iter__(self):
        first = self.epoch * len(self)
        return iter([i if first + i < self.limit else 0 for i in range(len(self))])


@HOOKS.register_module()
class Recorder(Hook):
    """Image ids and the state of the loss of every iteration."""

    batches: list = []
    active: list = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.batches.append([sample.img_id - 1 for sample in data_batch['data_samples']])
        loss = runner.model.roi_head.bbox_head.loss_cls
        self.active.append(getattr(loss, 'active', None))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No sleep of MMEngine's endless iterator between passes."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('deferred')
    make_toy_coco(folder, num_images=IMAGES)
    return folder


def config(
    folder, work, hooks, sampler='FakeSampler', loss=True, loop=None, length=2, workers=0, **keys
):
    overrides = dict(work_dir=str(work), custom_hooks=[*hooks, dict(type='mmdet_lt.Recorder')])
    cfg = toy_config(folder, 'faster_rcnn', epochs=length, overrides=overrides)
    cfg.train_dataloader.sampler = dict(type=f'mmdet_lt.{sampler}')
    if sampler == 'RepeatFactorSampler':
        cfg.train_dataloader.sampler.repeat_thr = 1.0
    if workers:
        cfg.train_dataloader.update(num_workers=workers, persistent_workers=True)
    if loss:
        cfg.model.roi_head.bbox_head.loss_cls.type = 'mmdet_lt.SwitchableLoss'
    if loop:
        cfg.train_cfg = dict(type=loop, max_iters=length, val_interval=10**6)
        cfg.default_hooks.checkpoint.update(by_epoch=False, interval=3)
        cfg.log_processor.by_epoch = False
    cfg.merge_from_dict(keys)
    return cfg


def deferred(**keys):
    return dict(type='mmdet_lt.DeferredRebalancingHook', **keys)


def train(cfg):
    """(batches of image numbers, state of the loss) of every iteration."""
    Recorder.batches, Recorder.active = [], []
    runner = Runner.from_cfg(cfg)
    runner.train()
    workers = runner.train_dataloader._iterator
    if workers is not None:  # left to the garbage collector they take 5 s each to end
        workers._shutdown_workers()
    return Recorder.batches, Recorder.active, runner


ORDER = [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize('workers', [0, 2])
def test_epoch_loop_at_an_epoch(folder, tmp_path, workers, monkeypatch):
    lines = []
    monkeypatch.setattr(
        deferred_rebalancing_hook, 'print_log', lambda line, **o: lines.append(line)
    )
    cfg = config(folder, tmp_path, [deferred(epoch=2)], length=3, workers=workers)
    batches, active, runner = train(cfg)
    assert batches == [*ORDER, *ORDER, *[[0, 0]] * 4]
    assert active == [False] * 8 + [True] * 4
    assert runner.train_dataloader.sampler.calls == [dict(epoch=2, num_samples=None)]
    what = '(it starts with epoch 3): FakeSampler, roi_head.bbox_head.loss_cls'
    assert lines == [f'Re-balancing is off {what}', f'Re-balancing is on {what}']


@pytest.mark.parametrize('workers', [0, 2])
def test_epoch_loop_at_an_iteration(folder, tmp_path, workers):
    cfg = config(folder, tmp_path, [deferred(iteration=5)], workers=workers)
    batches, active, _ = train(cfg)
    assert batches == [*ORDER, [0, 1], *[[0, 0]] * 3]
    assert active == [False] * 5 + [True] * 3


@pytest.mark.parametrize('workers', [0, 2])
def test_iteration_loop_whose_workers_began_to_load(folder, tmp_path, workers):
    cfg = config(folder, tmp_path, [deferred(iteration=1)], loop=STOCK, length=4, workers=workers)
    batches, active, runner = train(cfg)
    assert batches == [[0, 1], [0, 0], [0, 0], [0, 0]]
    assert active == [False, True, True, True]
    assert runner.train_dataloader.sampler.calls == [dict(epoch=None, num_samples=2)]


def stream(batches):
    return [image for batch in batches for image in batch]


@pytest.mark.parametrize(('loop', 'workers'), [(STOCK, 2), (OURS, 2), (OURS, 0)])
def test_real_sampler_in_iteration_loops(folder, tmp_path, loop, workers):
    options = dict(sampler='RepeatFactorSampler', loop=loop, length=9, workers=workers)
    batches, active, runner = train(
        config(folder, tmp_path / 'a', [deferred(iteration=6)], **options)
    )
    always, _, _ = train(config(folder, tmp_path / 'b', [], loss=False, **options))
    assert len(runner.train_dataloader.sampler) > IMAGES  # some images are repeated
    assert stream(batches[6:]) == stream(always[6:])
    assert sorted(stream(batches)[:IMAGES]) == list(range(IMAGES))  # plain: once in a pass
    assert stream(batches[:6]) != stream(always[:6])
    assert active == [False] * 6 + [True] * 3


@pytest.mark.parametrize(('loop', 'switch'), [(STOCK, 5), (OURS, 5), (OURS, 3), (OURS, 2)])
def test_resume_on_either_side(folder, tmp_path, loop, switch):
    """A run killed after 3 iterations goes on like the unbroken one."""
    options = dict(sampler='RepeatFactorSampler', loop=loop, workers=2)
    hooks = [deferred(iteration=switch)]
    batches, active, _ = train(config(folder, tmp_path / 'a', hooks, length=7, **options))
    keys = dict(resume=True, load_from=str(tmp_path / 'a' / 'iter_3.pth'))
    again = train(config(folder, tmp_path / 'b', hooks, length=7, **options, **keys))
    assert again[0] == batches[3:] and again[1] == active[3:]
    assert active == [False] * switch + [True] * (7 - switch)


@pytest.mark.parametrize('switch', [1, 2])
def test_resume_in_epoch_loop(folder, tmp_path, switch):
    hooks = [deferred(epoch=switch)]
    batches, active, _ = train(config(folder, tmp_path / 'a', hooks, length=3))
    keys = dict(resume=True, load_from=str(tmp_path / 'a' / 'epoch_1.pth'))
    again = train(config(folder, tmp_path / 'b', hooks, length=3, **keys))
    assert again[0] == batches[4:] and again[1] == active[4:]


def test_short_last_batch_and_accumulation(folder, tmp_path):
    """8 images in batches of 3 are 3 iterations a pass, the last with 2 images."""
    keys = {'train_dataloader.batch_size': 3, 'optim_wrapper.accumulative_counts': 2}
    batches, active, runner = train(
        config(folder, tmp_path, [deferred(iteration=4)], length=2, **keys)
    )
    assert runner.train_dataloader.sampler.calls == [dict(epoch=None, num_samples=11)]
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 7], [0, 1, 2], [0, 0, 0], [0, 0]]
    assert active == [False] * 4 + [True] * 2


def test_batch_sampler_of_the_config(folder, tmp_path):
    keys = {'train_dataloader.batch_sampler': dict(type='AspectRatioBatchSampler')}
    batches, _, _ = train(config(folder, tmp_path, [deferred(epoch=1)], length=2, **keys))
    assert batches == [*ORDER, *[[0, 0]] * 4]


def test_only_one_side(folder, tmp_path):
    batches, active, _ = train(config(folder, tmp_path / 'a', [deferred(epoch=1, loss=False)]))
    assert batches[4:] == [[0, 0]] * 4 and active == [None] * 8
    batches, active, _ = train(config(folder, tmp_path / 'b', [deferred(epoch=1, sampler=False)]))
    assert batches == [[0, 0]] * 8 and active == [False] * 4 + [True] * 4
    two = [deferred(epoch=1, loss=False), deferred(iteration=2, sampler=False)]
    batches, active, _ = train(config(folder, tmp_path / 'c', two))
    assert batches[4:] == [[0, 0]] * 4 and active == [False] * 2 + [True] * 6


@pytest.mark.parametrize(
    ('keys', 'message'),
    [
        ({}, r'`DeferredRebalancingHook.epoch` or .*iteration` .* found neither'),
        (dict(epoch=1, iteration=2), 'found both'),
        (dict(epoch=-1), r'`DeferredRebalancingHook.epoch` must be a whole number'),
        (dict(iteration=2.5), r'`DeferredRebalancingHook.iteration` must be a whole number'),
        (dict(epoch=True), 'found True'),
        (dict(epoch=1, sampler=False, loss=False), 'nothing to switch'),
    ],
)
def test_bad_arguments(keys, message):
    with pytest.raises(InputError, match=message):
        DeferredRebalancingHook(**keys)


@pytest.mark.parametrize(
    ('hooks', 'options', 'message'),
    [
        ([deferred(epoch=2)], {}, r'epoch` must lie before .* 2 epochs \(`train_cfg.max_epochs`\)'),
        ([deferred(iteration=8)], {}, r'which has 8 iterations \(`train_cfg.max_iters`\), found 8'),
        (
            [deferred(epoch=1)],
            dict(loop=STOCK),
            r'needs an epoch loop, .* `DeferredRebalancingHook.iteration` .* 4 iterations',
        ),
        ([deferred(epoch=1)] * 2, {}, 'two DeferredRebalancingHooks switch the sampler'),
        (
            [deferred(epoch=1)],
            dict(loss=False, **{'train_dataloader.sampler.type': 'DefaultSampler'}),
            r'nothing to switch: .* found DefaultSampler and no module',
        ),
        (
            [deferred(epoch=1, sampler=True)],
            {'train_dataloader.sampler.type': 'DefaultSampler'},
            r'sampler=True` needs a re-balancing sampler',
        ),
        ([deferred(epoch=1, loss=True)], dict(loss=False), r'loss=True` needs a loss'),
    ],
)
def test_bad_configs_stop_before_training(folder, tmp_path, hooks, options, message):
    with pytest.raises(InputError, match=message):
        train(config(folder, tmp_path, hooks, **options))
    assert Recorder.batches == []


def test_test_runs_are_left_alone(folder, tmp_path):
    runner = Runner.from_cfg(config(folder, tmp_path, [deferred(epoch=99)]))
    runner.call_hook('before_run')
