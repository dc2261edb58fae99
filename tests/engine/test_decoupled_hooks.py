"""FreezeHook and ClassifierInitHook in real second stages: what changes, what is refused."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy import make_toy_coco, toy_config

from mmdet_lt.engine.hooks.classifier_init_hook import ClassifierInitHook
from mmdet_lt.engine.hooks.freeze_hook import FreezeHook
from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.weight_scaling import ScaledLinear
from mmdet_lt.models.losses.eqlv2_loss import EQLv2Loss
from mmdet_lt.registry import HOOKS
from mmdet_lt.utils.patterns import check_patterns, is_named, nearest

HEAD = 'roi_head.bbox_head'
CLASSIFIER = f'{HEAD}.fc_cls'


@HOOKS.register_module()
class FirstIteration(Hook):
    """Keeps the weights with which training began."""

    priority = 'LOWEST'
    state: dict = {}

    def before_train(self, runner):
        FirstIteration.state = hashes(runner.model.state_dict())


def hashes(state):
    return {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in state.items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toy')
    make_toy_coco(folder, num_images=6)
    return folder


def config(data, work_dir, hooks=(), model='faster_rcnn', epochs=1, num_classes=3, **overrides):
    cfg = toy_config(data, model, epochs=epochs, num_classes=num_classes, overrides=overrides)
    cfg.model.backbone.norm_eval = False  # batch norm would learn its statistics
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=0.1)
    cfg.custom_hooks = [
        dict(type='mmdet_lt.ClassStatisticsHook'),
        *hooks,
        dict(type='mmdet_lt.FirstIteration'),
    ]
    cfg.custom_imports = dict(imports=['mmdet_lt'])
    cfg.work_dir, cfg.log_level = str(work_dir), 'ERROR'
    cfg.experiment_name = str(work_dir).replace('/', '_') + str(epochs)
    return cfg


@pytest.fixture(scope='module')
def stage1(data, tmp_path_factory):
    """A trained first stage: its checkpoint."""
    folder = tmp_path_factory.mktemp('stage1')
    Runner.from_cfg(config(data, folder)).train()
    return str(folder / 'epoch_1.pth')


def second(data, work_dir, checkpoint, trainable, mode, **kwargs) -> Config:
    hooks = [
        dict(type='mmdet_lt.FreezeHook', trainable=trainable),
        dict(type='mmdet_lt.ClassifierInitHook', mode=mode),
    ]
    cfg = config(data, work_dir, hooks, **kwargs)
    cfg.load_from = checkpoint
    return cfg


def weights(path):
    return torch.load(path, map_location='cpu', weights_only=False)['state_dict']


# ---- what changes ----------------------------------------------------------------------------


def test_crt_changes_the_classifier_only(data, stage1, tmp_path):
    Runner.from_cfg(second(data, tmp_path, stage1, [CLASSIFIER], 'reinit')).train()
    first, last = weights(stage1), weights(tmp_path / 'epoch_1.pth')
    names = {f'{CLASSIFIER}.weight', f'{CLASSIFIER}.bias'}
    assert changed(hashes(first), FirstIteration.state) == names  # started anew
    assert changed(FirstIteration.state, hashes(last)) == names  # and nothing else moved
    # Batch norm saw three batches in training mode, so the test would notice its statistics.
    plain = second(data, tmp_path / 'plain', stage1, [CLASSIFIER], 'reinit')
    plain.custom_hooks = [plain.custom_hooks[0], *plain.custom_hooks[2:]]
    Runner.from_cfg(plain).train()
    moved = changed(hashes(first), hashes(weights(tmp_path / 'plain' / 'epoch_1.pth')))
    assert {'backbone.bn1.running_mean', 'backbone.conv1.weight'} <= moved


def test_lws_learns_its_factors_only(data, stage1, tmp_path):
    cfg = second(data, tmp_path, stage1, CLASSIFIER, 'keep')
    cfg.model.roi_head.bbox_head.cls_predictor_cfg = dict(type='mmdet_lt.ScaledLinear')
    Runner.from_cfg(cfg).train()
    first, last = weights(stage1), weights(tmp_path / 'epoch_1.pth')
    scale = last.pop(f'{CLASSIFIER}.scale')
    assert scale.shape == (4,) and (scale != 1).all()
    assert changed(hashes(first), hashes(last)) == set()


def test_bags_from_a_softmax_checkpoint(data, stage1, tmp_path):
    cfg = second(data, tmp_path, stage1, [CLASSIFIER], 'reinit')
    cfg.model.roi_head.bbox_head.loss_cls = dict(
        type='mmdet_lt.GroupSoftmaxLoss', use_sigmoid=False, bin_split=(4,)
    )
    Runner.from_cfg(cfg).train()
    last = weights(tmp_path / 'epoch_1.pth')
    assert last[f'{CLASSIFIER}.weight'].shape[0] == 3 + 1 + 3
    shared = weights(stage1).keys() - {f'{CLASSIFIER}.weight', f'{CLASSIFIER}.bias'}
    assert all(torch.equal(last[name], weights(stage1)[name]) for name in shared)


def test_named_parts_with_norms_learn_their_statistics(data, stage1, tmp_path):
    cfg = second(data, tmp_path, stage1, ['backbone.layer1', CLASSIFIER], 'keep')
    Runner.from_cfg(cfg).train()
    moved = changed(hashes(weights(stage1)), hashes(weights(tmp_path / 'epoch_1.pth')))
    assert 'backbone.layer1.0.bn1.running_mean' in moved
    assert all(name.startswith(('backbone.layer1.', CLASSIFIER)) for name in moved)


@pytest.mark.parametrize('update_buffers', [False, True])
def test_averages_of_frozen_parts_are_exact(data, stage1, tmp_path, update_buffers):
    """``(1 - m) x + m x`` is not always ``x``: MMDetection's average of YOLOX rounds."""
    cfg = second(data, tmp_path, stage1, [CLASSIFIER], 'reinit', epochs=2)
    average = dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=0.3,
        gamma=1,
        update_buffers=update_buffers,
    )
    cfg.custom_hooks.append(average)
    Runner.from_cfg(cfg).train()
    checkpoint = torch.load(tmp_path / 'epoch_2.pth', map_location='cpu', weights_only=False)
    averaged, first = checkpoint['state_dict'], hashes(weights(stage1))
    names = {f'{CLASSIFIER}.weight', f'{CLASSIFIER}.bias'}
    assert changed(first, hashes(averaged)) == names
    for name in names:  # which are averages
        last = checkpoint['ema_state_dict'][f'module.{name}']
        assert not torch.equal(averaged[name], last)


class _Group:
    """A process group of this process alone."""

    def __init__(self, folder):
        self.address = f'file://{folder}/group'

    def __enter__(self):
        torch.distributed.init_process_group('gloo', init_method=self.address, rank=0, world_size=1)

    def __exit__(self, *error):
        torch.distributed.destroy_process_group()


def test_batch_norm_that_wrapping_replaces_stays_frozen(tmp_path):
    """With ``sync_bn='torch'`` every call of ``wrap_model`` makes new layers."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))

    def wrap_model(config, bare):
        return nn.SyncBatchNorm.convert_sync_batchnorm(bare)

    with _Group(tmp_path):
        runner = SimpleNamespace(
            model=DistributedDataParallel(model), cfg={}, wrap_model=wrap_model, hooks=[]
        )
        runner._train_loop = object.__new__(EpochBasedTrainLoop)
        hook = FreezeHook('2')
        hook.before_run(runner)
        norm = runner.model[1]
        assert isinstance(norm, nn.SyncBatchNorm)
        runner.model.train()
        hook.before_train_iter(runner, 0)
    assert not norm.training and runner.model[2].training


def test_resume_of_the_second_stage(data, stage1, tmp_path):
    """Two epochs in one go and with a break after the first end the same, bit for bit."""
    kwargs = {'train_dataloader.sampler.shuffle': False}
    full = second(data, tmp_path / 'full', stage1, [CLASSIFIER], 'reinit', epochs=2, **kwargs)
    Runner.from_cfg(full).train()
    parts = second(data, tmp_path / 'parts', stage1, [CLASSIFIER], 'reinit', epochs=2, **kwargs)
    runner = Runner.from_cfg(parts)
    runner.train_loop._max_epochs = 1
    runner.train()
    half = weights(tmp_path / 'parts' / 'epoch_1.pth')
    again = second(data, tmp_path / 'parts', '', [CLASSIFIER], 'reinit', epochs=2, **kwargs)
    again.update(resume=True, load_from=None, experiment_name='again')
    Runner.from_cfg(again).train()
    assert changed(hashes(half), FirstIteration.state) == set()  # the classifier was not reset
    last = weights(tmp_path / 'parts' / 'epoch_2.pth')
    names = {f'{CLASSIFIER}.weight', f'{CLASSIFIER}.bias'}
    assert changed(hashes(half), hashes(last)) == names
    assert changed(hashes(weights(stage1)), hashes(last)) == names


def test_a_test_run_is_left_alone(data, stage1, tmp_path):
    cfg = second(data, tmp_path, stage1, [CLASSIFIER], 'reinit')
    runner = Runner.from_cfg(cfg)
    runner.test()
    loaded = runner.model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights(stage1).items())
    assert all(p.requires_grad for p in runner.model.roi_head.parameters())


# ---- what is refused -------------------------------------------------------------------------


def refuse(cfg, match):
    with pytest.raises(InputError, match=match):
        Runner.from_cfg(cfg).train()


@pytest.mark.parametrize(
    ('trainable', 'match'),
    [
        (['roi_head.bbox_head.fc_clss'], rf"'roi_head\.bbox_head\.fc_clss'.*{CLASSIFIER}"),
        (['fc_cls'], rf"'fc_cls', which matches no.*{CLASSIFIER}"),
        ([], r'FreezeHook\.trainable` must name at least one part'),
        (3, r'FreezeHook\.trainable` must name at least one part .* found 3'),
    ],
)
def test_wrong_freeze_patterns(data, stage1, tmp_path, trainable, match):
    refuse(second(data, tmp_path, stage1, trainable, 'reinit'), match)


def test_nothing_left_to_train(data, stage1, tmp_path):
    cfg = second(data, tmp_path, stage1, [f'{CLASSIFIER}.weight'], 'keep')
    cfg.model.roi_head.bbox_head.cls_predictor_cfg = dict(type='mmdet_lt.ScaledLinear')
    refuse(cfg, 'leaves nothing to train')


def test_a_name_of_frozen_parts_only_beside_others(data, stage1, tmp_path):
    cfg = second(data, tmp_path, stage1, ['backbone.layer1', CLASSIFIER], 'keep')
    cfg.model.backbone.frozen_stages = 1
    refuse(cfg, r"names 'backbone\.layer1', which leaves nothing to train.*frozen_stages")


def test_what_starts_anew_must_learn(data, stage1, tmp_path):
    """A frozen classifier of random weights would train the rest, or its factors, for nothing."""
    cfg = second(data, tmp_path, stage1, ['rpn_head'], 'reinit')
    refuse(cfg, rf"mode='reinit'` starts `{CLASSIFIER}\.weight` anew, which is frozen.*trainable")
    model = nn.ModuleDict(dict(head=nn.ModuleDict(dict(fc_cls=ScaledLinear(2, 2)))))
    with pytest.raises(InputError, match=r"starts `head\.fc_cls\.weight` anew.*mode='keep'"):
        ClassifierInitHook('reinit').check_model(model)
    assert ClassifierInitHook('keep').check_model(model) == ('*.fc_cls',)


def altered(stage1, path, change):
    checkpoint = torch.load(stage1, map_location='cpu', weights_only=False)
    change(checkpoint['state_dict'])
    torch.save(checkpoint, path)
    return str(path)


def test_wrong_checkpoints(data, stage1, tmp_path):
    def run(checkpoint, mode, match, **kwargs):
        refuse(second(data, tmp_path, checkpoint, [CLASSIFIER], mode, **kwargs), match)

    without = altered(stage1, tmp_path / 'without.pth', lambda s: s.pop(f'{CLASSIFIER}.weight'))
    run(without, 'keep', rf'no classifier `{CLASSIFIER}\.weight` to keep.*reinit')
    bare = altered(stage1, tmp_path / 'bare.pth', lambda s: s.pop('neck.lateral_convs.0.conv.bias'))
    run(bare, 'reinit', r'1 of the \d+ tensors outside .*`neck\.lateral_convs\.0\.conv\.bias`')
    wide = altered(
        stage1,
        tmp_path / 'wide.pth',
        lambda s: s.update({f'{CLASSIFIER}.weight': torch.zeros(9, 32)}),
    )
    run(wide, 'keep', r'of 3 classes cannot be kept.*\(9, 32\) there and \(4, 32\)')
    run('', 'keep', r'name the checkpoint of the first in `load_from`')
    scaled = altered(
        stage1, tmp_path / 'scaled.pth', lambda s: s.update({f'{CLASSIFIER}.scale': torch.ones(4)})
    )
    run(scaled, 'keep', rf'has `{CLASSIFIER}\.scale`, which that of this model has not.*predictor')


def test_class_agnostic_parts_are_compared_too(data, stage1, tmp_path):
    """Box regression of three classes does not fit two, even where the classifier starts anew."""
    two = tmp_path / 'two'
    make_toy_coco(two, num_images=6, num_classes=2)
    cfg = second(two, tmp_path / 'run', stage1, [CLASSIFIER], 'reinit', num_classes=2)
    refuse(cfg, r'of 3 classes does not fit: `roi_head\.bbox_head\.fc_reg\.weight` has shape \(12,')


def test_eqlv2_checkpoint_of_another_class_count_and_family(data, tmp_path):
    def eqlv2(cfg):
        cfg.model.roi_head.bbox_head.loss_cls = dict(type='mmdet_lt.EQLv2Loss', use_sigmoid=True)
        cfg.model.roi_head.bbox_head.reg_class_agnostic = True
        return cfg

    Runner.from_cfg(eqlv2(config(data, tmp_path / 'first'))).train()
    checkpoint = str(tmp_path / 'first' / 'epoch_1.pth')
    # The same family and classes: kept with its gradient sums, which go on.
    kept = eqlv2(second(data, tmp_path / 'kept', checkpoint, [CLASSIFIER], 'keep'))
    Runner.from_cfg(kept).train()
    sums = f'{HEAD}.loss_cls.neg_grad'
    assert FirstIteration.state[sums] == hashes(weights(checkpoint))[sums]
    # Anew: they are forgotten with the classifier.
    anew = eqlv2(second(data, tmp_path / 'anew', checkpoint, [CLASSIFIER], 'reinit'))
    Runner.from_cfg(anew).train()
    assert FirstIteration.state[sums] == hashes({sums: torch.zeros(3)})[sums]
    two = tmp_path / 'two'
    make_toy_coco(two, num_images=6, num_classes=2)
    cfg = eqlv2(second(two, tmp_path / 'x', checkpoint, [CLASSIFIER], 'keep', num_classes=2))
    refuse(cfg, r'of 3 classes cannot be kept.*\(4, 32\) there and \(3, 32\)')
    dense = second(data, tmp_path / 'y', checkpoint, ['bbox_head'], 'keep', model='retinanet')
    dense.custom_hooks[2]['classifier'] = 'bbox_head.retina_cls'
    refuse(dense, r'is of another model: \d+ of the \d+ tensors .*`bbox_head\.')


def test_every_load_says_both_class_counts():
    """Fine-tuning and tests know nothing of the hook."""
    saved = {f'loss_cls.{k}': v for k, v in EQLv2Loss(num_classes=3).state_dict().items()}
    model = nn.ModuleDict(dict(loss_cls=EQLv2Loss(num_classes=2)))
    with pytest.raises(RuntimeError, match='`loss_cls`.* of 3 classes, .*of this model is 2: they'):
        model.load_state_dict(saved)
    nn.ModuleDict(dict(loss_cls=EQLv2Loss(num_classes=3))).load_state_dict(saved)


def test_loss_statistics_of_another_class_count(data, tmp_path, stage1):
    """The classifier has the right width by chance, the statistics beside it have not."""
    checkpoint = altered(
        stage1,
        tmp_path / 'sums.pth',
        lambda s: s.update(
            {
                f'{HEAD}.loss_cls.pos_grad': torch.zeros(5),
                f'{HEAD}.loss_cls.neg_grad': torch.zeros(5),
            }
        ),
    )
    cfg = second(data, tmp_path / 'run', checkpoint, [CLASSIFIER], 'keep')
    cfg.model.roi_head.bbox_head.loss_cls = dict(type='mmdet_lt.EQLv2Loss', use_sigmoid=True)
    refuse(cfg, r'another class count: `.*pos_grad` has shape \(5,\) there and \(3,\)')


def test_resume_without_anything_to_resume(data, tmp_path):
    cfg = second(data, tmp_path, '', [CLASSIFIER], 'reinit')
    cfg.update(resume=True, load_from=None)
    refuse(cfg, 'nothing was loaded.*load_from')


def test_bad_arguments():
    with pytest.raises(InputError, match=r"mode` must be one of .* found 'reset'"):
        ClassifierInitHook('reset')
    model = torch.nn.Module()
    model.fc = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r'ClassifierInitHook\.classifier.*nearest names are fc'):
        ClassifierInitHook('keep').check_model(model)
    assert FreezeHook('fc').check_model(model) == ['fc.weight', 'fc.bias']


def test_patterns():
    names = ['roi_head.bbox_head.0.fc_cls.weight', 'roi_head.bbox_head.1.fc_cls.weight', 'neck.a']
    assert is_named(names[0], ['roi_head.bbox_head.*.fc_cls'])
    assert is_named(names[0], ['*.fc_cls']) and is_named(names[0], ['roi_head'])
    assert not is_named(names[0], ['roi_head.bbox_head.1']) and not is_named(names[0], ['fc_cls'])
    assert check_patterns('neck', names, 'key') == ('neck',)
    assert nearest('nek.a', names)[0] == 'neck.a'
    assert nearest('*.fc_class', names)[0].endswith('fc_cls')
