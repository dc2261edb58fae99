"""Resume of iteration loops: the same images as without interruption, without loading old ones."""

from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmdet.registry import LOOPS as HOST_LOOPS
from mmdet.registry import MODELS
from mmengine.dataset import BaseDataset, DefaultSampler
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.runner import loops as mmengine_loops
from torch.utils.data import DataLoader
from toy import make_toy_coco, toy_config

from mmdet_lt import InputError
from mmdet_lt.datasets.samplers.repeat_factor_sampler import RepeatFactorSampler
from mmdet_lt.engine.checkpoints import read_checkpoint
from mmdet_lt.engine.hooks.sampler_state_hook import KEY
from mmdet_lt.engine.loops import iter_based_train_loop as loops
from mmdet_lt.engine.loops.positions import loader_sampler, samples_before


@MODELS.register_module()
class CountingModel(BaseModel):
    """One weight; the order of the images is all that matters here."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs, data_samples=None, mode='loss'):
        return dict(loss=(self.weight - 1).square().sum())


RFS = dict(type='mmdet_lt.RepeatFactorSampler', repeat_thr=0.6)
SAMPLERS = {
    'rfs': RFS,
    'irfs': dict(RFS, type='mmdet_lt.InstanceAwareRepeatFactorSampler'),
    'balanced': dict(type='mmdet_lt.ClassBalancedSampler'),
    'root': dict(type='mmdet_lt.SquareRootSampler'),
    'progressive': dict(type='mmdet_lt.ProgressivelyBalancedSampler', max_samples=40),
}


@pytest.fixture(autouse=True)
def _no_naps(monkeypatch):
    """MMEngine's endless iterator sleeps 2 s between epochs."""
    monkeypatch.setattr(mmengine_loops, 'time', SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('loop')
    make_toy_coco(folder, num_images=7, num_classes=5, boxes_per_image=1)
    return folder


class Record(Hook):
    """Note the images of each iteration, and stop like a killed process."""

    priority = 'VERY_LOW'

    def __init__(self, stop=None, defer=None):
        self.seen, self.stop, self.defer = [], stop, defer

    def before_train(self, runner):
        if self.defer is not None:
            loader_sampler(runner.train_dataloader).defer_until(**self.defer)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.stop:
            raise KeyboardInterrupt
        self.seen.append([sample.img_id for sample in data_batch['data_samples']])


def make_config(data, work_dir, sampler, workers=0, seed=0, loop='mmdet_lt.IterBasedTrainLoop'):
    cfg = toy_config(data, num_classes=5)
    cfg.work_dir, cfg.model = str(work_dir), dict(type='CountingModel')
    cfg.train_cfg = dict(type=loop, max_iters=12, val_interval=1000)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=5)
    cfg.log_processor.by_epoch = False
    cfg.custom_hooks = [dict(type='mmdet_lt.SamplerStateHook')]
    cfg.randomness = dict(seed=seed)
    cfg.train_dataloader.dataset.serialize_data = False  # its garbage collection is slow in tests
    cfg.train_dataloader.update(
        num_workers=workers, persistent_workers=workers > 0, sampler=dict(sampler)
    )
    return cfg


def train(cfg, name, checkpoint=None, **hook):
    cfg.experiment_name = f'{cfg.work_dir}-{name}'
    if checkpoint is not None:
        cfg.update(resume=True, load_from=str(checkpoint))
    runner = Runner.from_cfg(cfg)
    record = Record(**hook)
    runner.register_hook(record)
    try:
        runner.train()
        assert record.stop is None
    except KeyboardInterrupt:
        assert record.stop is not None
    finally:
        stop_workers(runner.train_dataloader)
    return runner, record.seen


def stop_workers(loader):
    """Workers forked later would inherit these ones' queues and wait for them when they end."""
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()


def expected_batches(runner, number, batch=2):
    """Image ids of an uninterrupted run, from the epochs of its sampler."""
    sampler = loader_sampler(runner.train_dataloader)
    data_set = runner.train_dataloader.dataset
    batches, epoch = [], 0
    while len(batches) < number:
        ids = [data_set.get_data_info(int(i))['img_id'] for i in sampler.epoch_indices(epoch)]
        batches += [ids[k : k + batch] for k in range(0, len(ids), batch)]
        epoch += 1
    return batches[:number]


@pytest.mark.parametrize(
    'name, workers', [('rfs', 0), ('rfs', 2), ('progressive', 2), ('irfs', 0), ('balanced', 0)]
)
def test_killed_and_resumed(data, tmp_path, name, workers):
    cfg = make_config(data, tmp_path, SAMPLERS[name], workers)
    _, before = train(cfg.copy(), 'killed', stop=8)  # workers have drawn further than that
    assert len(before) == 8
    resumed, after = train(cfg.copy(), 'resumed', tmp_path / 'iter_5.pth')
    full = expected_batches(resumed, 12)
    assert before == full[:8] and after == full[5:]


def test_old_data_are_not_loaded(data, tmp_path, monkeypatch):
    cfg = make_config(data, tmp_path, SAMPLERS['rfs'])
    train(cfg.copy(), 'killed', stop=11)
    loaded = []
    original = BaseDataset.__getitem__
    monkeypatch.setattr(
        BaseDataset, '__getitem__', lambda self, i: loaded.append(i) or original(self, i)
    )
    _, seen = train(cfg.copy(), 'resumed', tmp_path / 'iter_10.pth')
    assert len(seen) == 2 and len(loaded) == sum(map(len, seen))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_drawn_seed_survives(data, tmp_path, workers):
    cfg = make_config(data, tmp_path, SAMPLERS['root'], workers, seed=None)
    first, before = train(cfg.copy(), 'killed', stop=8)
    seed = loader_sampler(first.train_dataloader).seed
    resumed, after = train(cfg.copy(), 'resumed', tmp_path / 'iter_5.pth')
    assert loader_sampler(resumed.train_dataloader).seed == seed
    full = expected_batches(resumed, 12)
    assert before == full[:8] and after == full[5:]


def test_epoch_loops_resume_with_the_drawn_seed(data, tmp_path):
    cfg = make_config(data, tmp_path, SAMPLERS['rfs'], seed=None)
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=1000)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
    cfg.log_processor.by_epoch = True
    first, _ = train(cfg.copy(), 'killed', stop=9)  # in the second epoch
    resumed, after = train(cfg.copy(), 'resumed', tmp_path / 'epoch_1.pth')
    sampler = loader_sampler(resumed.train_dataloader)
    assert sampler.seed == loader_sampler(first.train_dataloader).seed
    length = len(resumed.train_dataloader)
    assert after == expected_batches(resumed, 3 * length)[length:]


@pytest.mark.parametrize('resume_at, position', [(5, 15), (10, 15), (5, 0), (10, 3)])
def test_resume_on_either_side_of_a_switch(data, tmp_path, resume_at, position):
    cfg = make_config(data, tmp_path, SAMPLERS['balanced'], workers=2)
    switch = dict(num_samples=position)
    _, before = train(cfg.copy(), 'killed', stop=resume_at + 1, defer=switch)
    resumed, after = train(cfg.copy(), 'resumed', tmp_path / f'iter_{resume_at}.pth', defer=switch)
    sampler = loader_sampler(resumed.train_dataloader)
    assert sampler.switch_sample == position and not sampler.stale
    full = expected_batches(resumed, 12)
    assert before == full[: resume_at + 1] and after == full[resume_at:]
    plain = [i for batch in full for i in batch][: position // 7 * 7]
    assert sorted(plain[:7]) == [1, 2, 3, 4, 5, 6, 7][: len(plain)]


def test_samplers_without_skip_are_replayed(data, tmp_path, caplog):
    cfg = make_config(data, tmp_path, dict(type='DefaultSampler', shuffle=True))
    _, before = train(cfg.copy(), 'killed', stop=8)
    with caplog.at_level('WARNING'):
        _, after = train(cfg.copy(), 'resumed', tmp_path / 'iter_5.pth')
    assert after[:3] == before[5:] and len(after) == 7
    text = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'DefaultSampler has no skip(): 5 batches are loaded again' in text


# ---- the state in the checkpoint ---------------------------------------------------------------


def test_the_checkpoint_holds_plain_values(data, tmp_path):
    cfg = make_config(data, tmp_path, SAMPLERS['rfs'])
    runner, _ = train(cfg.copy(), 'killed', stop=6)
    saved = read_checkpoint(tmp_path / 'iter_5.pth', 'test')[KEY]
    assert saved == loader_sampler(runner.train_dataloader).state_dict()
    assert saved['seed'] == 0 and saved['parameters'] == dict(shuffle=True, repeat_thr=0.6)


@pytest.mark.parametrize(
    'sampler, message',
    [
        (SAMPLERS['root'], 'was trained with RepeatFactorSampler.*is now SquareRootSampler'),
        (dict(type='DefaultSampler'), 'was trained with RepeatFactorSampler.*DefaultSampler'),
        (dict(RFS, repeat_thr=0.5), r"'repeat_thr': 0\.6\} and is now \{'repeat_thr': 0\.5\}"),
    ],
)
def test_resume_with_another_sampler(data, tmp_path, sampler, message):
    train(make_config(data, tmp_path, RFS), 'first', stop=6)
    with pytest.raises(InputError, match=message):
        train(make_config(data, tmp_path, sampler), 'again', tmp_path / 'iter_5.pth')


def test_stock_to_own_sampler_is_refused_but_loading_is_not(data, tmp_path):
    train(make_config(data, tmp_path, dict(type='DefaultSampler')), 'first', stop=6)
    cfg = make_config(data, tmp_path, RFS)
    with pytest.raises(InputError, match='was trained with DefaultSampler'):
        train(cfg.copy(), 'again', tmp_path / 'iter_5.pth')
    cfg.load_from = str(tmp_path / 'iter_5.pth')  # a new run from old weights
    runner, seen = train(cfg, 'new', stop=3)
    assert seen == expected_batches(runner, 3)


def test_checkpoints_without_state_give_a_warning(data, tmp_path):
    cfg = make_config(data, tmp_path, RFS)
    cfg.custom_hooks = []
    train(cfg.copy(), 'first', stop=6)
    _, seen = train(make_config(data, tmp_path, RFS), 'again', tmp_path / 'iter_5.pth')
    assert len(seen) == 7
    text = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'holds no sampler state' in text


@pytest.mark.skipif(
    hasattr(mmengine_loops._InfiniteDataloaderIterator, 'skip_iter'),
    reason="the onedl fork's loop starts its workers after the checkpoint is read",
)
def test_stock_loop_with_workers_does_not_train_on_another_order(data, tmp_path):
    """Its workers draw with the new seed before the checkpoint brings the old one."""
    cfg = make_config(data, tmp_path, RFS, 2, seed=None, loop='IterBasedTrainLoop')
    train(cfg.copy(), 'first', stop=6)
    with pytest.raises(InputError, match=r"train_cfg.type='mmdet_lt.IterBasedTrainLoop'"):
        train(cfg.copy(), 'again', tmp_path / 'iter_5.pth')


def test_horizon_of_progressive_samplers(data, tmp_path):
    """12 iterations of 2 images, epochs of 7: three whole epochs, as `samples_before` counts."""
    cfg = make_config(data, tmp_path, dict(SAMPLERS['progressive'], max_samples=210))
    train(cfg, 'long', stop=1)
    text = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert 'reaches its end after max_samples=210, training after 21 samples' in text
    wrong = dict(type='mmdet_lt.ProgressivelyBalancedSampler', max_epochs=12)
    with pytest.raises(InputError, match=r'max_epochs.*iterations: write `max_samples=21`'):
        train(make_config(data, tmp_path, wrong), 'wrong')


# ---- positions ---------------------------------------------------------------------------------


class Shapes(BaseDataset):
    """Images of mixed shapes, without pixels."""

    def load_data_list(self):
        return [
            dict(instances=[dict(bbox_label=i % 3)], width=1 + (i * 7) % 5, height=3, number=i)
            for i in range(23)
        ]

    def __getitem__(self, index):
        return index


def make_loader(drop_last, workers, grouped, batch=4):
    data_set = Shapes(metainfo=dict(classes=['a', 'b', 'c']), serialize_data=False)
    sampler = RepeatFactorSampler(data_set, repeat_thr=0.5, seed=3)
    keys = dict(num_workers=workers, persistent_workers=workers > 0, collate_fn=list)
    if grouped:
        batches = AspectRatioBatchSampler(sampler, batch, drop_last)
        return DataLoader(data_set, batch_sampler=batches, **keys)
    return DataLoader(data_set, sampler=sampler, batch_size=batch, drop_last=drop_last, **keys)


@pytest.mark.parametrize('grouped', [False, True])
@pytest.mark.parametrize('drop_last, workers', [(False, 0), (True, 0), (True, 2), (False, 2)])
def test_every_iteration_can_be_resumed(drop_last, workers, grouped):
    """Also where batches are grouped by shape, and epochs end with an incomplete batch."""
    endless = mmengine_loops._InfiniteDataloaderIterator
    full = list(islice(endless(make_loader(drop_last, 0, grouped)), 30))
    for done in (0, 1, 5, 6, 7, 14) if not workers else (3, 10):
        loader = make_loader(drop_last, workers, grouped)
        assert samples_before(loader, len(loader)) == len(loader_sampler(loader))
        forwarded = loops._ForwardedIterator(loader, endless(loader), done)
        batches = list(islice(forwarded, 30))
        assert batches[:done] == [None] * done
        assert batches[done:] == full[done:]
        stop_workers(loader)


def test_the_plain_name_stays_mmengines():
    assert HOST_LOOPS.get('IterBasedTrainLoop') is mmengine_loops.IterBasedTrainLoop
    assert HOST_LOOPS.get('mmdet_lt.IterBasedTrainLoop') is loops.IterBasedTrainLoop


def test_positions_by_hand():
    loader = make_loader(False, 0, False)
    length = len(loader_sampler(loader))
    assert length % 4 and len(loader) == -(-length // 4)
    assert samples_before(loader, 0) == 0 and samples_before(loader, 3) == 12
    assert samples_before(loader, len(loader) + 2) == length + 8
    plain = Shapes()
    assert isinstance(
        loader_sampler(DataLoader(plain, sampler=DefaultSampler(plain))), DefaultSampler
    )
