"""MixupHook in real trainings: what is mixed, when, and that it ends exactly where it should."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from toy import make_toy_coco, toy_config
from toy_models import retinanet

from mmdet_lt.engine.hooks import mixup_hook
from mmdet_lt.engine.hooks.mixup_hook import MixupHook
from mmdet_lt.errors import InputError
from mmdet_lt.models.data_preprocessors.mixup import Mix, blend, draw_mix
from mmdet_lt.registry import HOOKS

pytestmark = pytest.mark.usefixtures('plain_config_dumps')


@HOOKS.register_module()
class InputRecorder(Hook):
    """What the backbone gets, and how many boxes, in every iteration."""

    inputs: list = []
    boxes: list = []
    weights: list = []

    def before_train(self, runner):
        runner.model.backbone.register_forward_pre_hook(self.note)
        runner.model.data_preprocessor.register_forward_hook(self.note_samples)

    def note(self, module, args):
        self.inputs.append(args[0].clone())

    def note_samples(self, module, args, output):
        instances = [sample.gt_instances for sample in output['data_samples']]
        self.boxes.append([len(item) for item in instances])
        self.weights.append([item.get('loss_weights') for item in instances])


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Eight images with two boxes each, two of them emptied."""
    folder = tmp_path_factory.mktemp('mixup')
    path = make_toy_coco(folder)
    content = json.loads(path.read_text())
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] > 2]
    path.write_text(json.dumps(content))
    return folder


def config(folder, work, hooks, model='retinanet', epochs=2, iterations=0, **keys):
    # The recorder comes last, so that it sees what mixup left.
    recorder = dict(type='mmdet_lt.InputRecorder', priority='LOWEST')
    overrides = dict(work_dir=str(work), custom_hooks=[*hooks, recorder])
    base = 'faster_rcnn' if model == 'mask_rcnn' else model
    cfg = toy_config(folder, base, epochs=epochs, overrides=overrides)
    if model == 'mask_rcnn':
        cfg.model.type = 'MaskRCNN'
        cfg.model.roi_head.mask_roi_extractor = copy.deepcopy(cfg.model.roi_head.bbox_roi_extractor)
        cfg.model.roi_head.mask_head = dict(
            type='FCNMaskHead',
            num_convs=1,
            in_channels=16,
            conv_out_channels=16,
            num_classes=3,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
        )
        cfg.model.train_cfg.rcnn.mask_size = 10
        cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    if iterations:
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=10**6)
        cfg.default_hooks.checkpoint.update(by_epoch=False, interval=10**6)
        cfg.log_processor.by_epoch = False
    cfg.merge_from_dict(keys)
    return cfg


def mixup(**keys):
    return dict(type='mmdet_lt.MixupHook', **keys)


def train(cfg):
    InputRecorder.inputs, InputRecorder.boxes, InputRecorder.weights = [], [], []
    runner = Runner.from_cfg(cfg)
    runner.train()
    return SimpleNamespace(
        runner=runner,
        weights=runner.model.state_dict(),
        inputs=InputRecorder.inputs,
        boxes=InputRecorder.boxes,
        box_weights=InputRecorder.weights,
    )


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize('model', ['retinanet', 'mask_rcnn'])
def test_lambda_one_is_training_without_mixup(folder, tmp_path, model, monkeypatch):
    plain = train(config(folder, tmp_path / 'a', [], model, epochs=1))
    monkeypatch.setattr(mixup_hook, 'draw_mix', lambda *args: Mix(1.0, (1, 0)))
    mixed = train(config(folder, tmp_path / 'b', [mixup()], model, epochs=1))
    assert mixed.box_weights[0][0] is not None and plain.box_weights[0][0] is None
    assert same(plain.weights, mixed.weights)


@pytest.mark.parametrize('unit', ['epoch', 'iteration'])
def test_mute_is_exact(folder, tmp_path, unit, monkeypatch):
    """Before the mute every batch is the blend by hand, from it on the plain batch."""
    lines = []
    monkeypatch.setattr(mixup_hook, 'print_log', lambda line, **options: lines.append(line))
    plain = train(config(folder, tmp_path / 'a', []))
    end = dict(epoch=dict(mute_epoch=1), iteration=dict(mute_iteration=3))[unit]
    mixed = train(config(folder, tmp_path / 'b', [mixup(**end)]))
    last = 4 if unit == 'epoch' else 3
    for number, (before, after) in enumerate(zip(plain.inputs, mixed.inputs, strict=True)):
        if number >= last:
            assert torch.equal(before, after)
            assert mixed.boxes[number] == plain.boxes[number]
            assert mixed.box_weights[number] == [None, None]
            continue
        lam = np.random.default_rng([0, 0, number])
        lam.permutation(2)
        lam = lam.beta(1.5, 1.5)
        torch.testing.assert_close(after, lam * before + (1 - lam) * before.flip(0))
        assert mixed.boxes[number] == [sum(plain.boxes[number])] * 2
        counts = sum(weights.sum() for weights in mixed.box_weights[number])
        assert counts.item() == pytest.approx(sum(plain.boxes[number]))
    start = 'epoch 2' if unit == 'epoch' else 'iteration 4'
    end = f'(it ends with the start of {start})'
    assert lines == [f'Mixup is on {end}', f'Mixup is off {end}']
    assert type(mixed.runner.model.bbox_head).__name__ == 'RetinaHead'


def test_muted_from_the_start(folder, tmp_path):
    plain = train(config(folder, tmp_path / 'a', [], epochs=1))
    muted = train(config(folder, tmp_path / 'b', [mixup(mute_epoch=0)], epochs=1))
    assert same(plain.weights, muted.weights)


def test_iteration_loop_and_running_statistics(folder, tmp_path):
    hooks = [dict(type='mmdet_lt.ClassStatisticsHook'), mixup(mute_iteration=2)]
    keys = {'model.roi_head.bbox_head.loss_cls.type': 'mmdet_lt.EQLv2Loss'}
    keys['model.roi_head.bbox_head.loss_cls.use_sigmoid'] = True
    run = train(config(folder, tmp_path, hooks, 'faster_rcnn', iterations=4, **keys))
    assert [weights[0] is None for weights in run.box_weights] == [False, False, True, True]
    assert all(torch.isfinite(value).all() for value in run.weights.values())
    assert (run.runner.model.roi_head.bbox_head.loss_cls.neg_grad > 0).all()


@pytest.mark.parametrize('mute', [1, 2])
def test_resume_on_either_side(folder, tmp_path, mute):
    hooks = [mixup(mute_epoch=mute)]
    unbroken = train(config(folder, tmp_path / 'a', hooks, epochs=3))
    keys = dict(resume=True, load_from=str(tmp_path / 'a' / 'epoch_1.pth'))
    resumed = train(config(folder, tmp_path / 'b', hooks, epochs=3, **keys))
    assert same(unbroken.weights, resumed.weights)
    assert len(resumed.inputs) == 8
    pairs = zip(unbroken.inputs[4:], resumed.inputs, strict=True)
    assert all(torch.equal(first, second) for first, second in pairs)


def test_seeded_and_different_from_plain(folder, tmp_path):
    runs = [
        train(config(folder, tmp_path / str(i), hooks, epochs=1))
        for i, hooks in enumerate(([mixup()], [mixup()], [mixup(alpha=0.2)], []))
    ]
    assert same(runs[0].weights, runs[1].weights)
    assert not same(runs[0].weights, runs[2].weights)
    assert not same(runs[0].weights, runs[3].weights)


def test_short_last_batch_and_ema(folder, tmp_path):
    """8 images in batches of 7: the batch of one image has no partner and stays as it is."""
    hooks = [dict(type='EMAHook'), mixup()]
    keys = {'train_dataloader.batch_size': 7}
    run = train(config(folder, tmp_path, hooks, epochs=1, **keys))
    assert [len(boxes) for boxes in run.boxes] == [7, 1]
    assert run.box_weights[1][0].tolist() == [1.0] * run.boxes[1][0]


# ---- one batch, without a runner ------------------------------------------------------------


def batch():
    torch.manual_seed(3)
    samples = []
    for index, size in enumerate([(64, 48), (40, 64), (64, 64)]):
        meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[4.0, 4, 30, 34]]), labels=torch.tensor([index])
        )
        samples.append(sample)
    images = [torch.randint(0, 255, (3, *s.img_shape), dtype=torch.uint8) for s in samples]
    return dict(inputs=images, data_samples=samples)


def stub(model, batch_size=3):
    loader = SimpleNamespace(batch_size=batch_size, batch_sampler=None)
    return SimpleNamespace(model=model, train_dataloader=loader, seed=5, iter=7, epoch=0)


def build(cfg=None):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MODELS.build(cfg or retinanet(3)).train()


def test_images_of_different_sizes_are_zero_outside():
    model = build()
    plain = model.data_preprocessor(batch(), True)['inputs']
    hook, runner = MixupHook(), stub(model)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    data = model.data_preprocessor(batch(), True)
    mix = draw_mix(np.random.default_rng([5, 0, 7]), 1.5, 3)
    torch.testing.assert_close(data['inputs'], blend(plain, mix), rtol=0, atol=0)
    corner = data['inputs'][1][:, 50:, 50:]  # outside of image 1, which is 40 high
    torch.testing.assert_close(corner, (1 - mix.lam) * plain[mix.partner[1]][:, 50:, 50:])
    assert data['data_samples'][1].img_shape == (64, 64)

    tested = model.data_preprocessor(batch(), False)
    torch.testing.assert_close(tested['inputs'], plain, rtol=0, atol=0)
    assert 'loss_weights' not in tested['data_samples'][0].gt_instances


@pytest.mark.parametrize('layer', ['backbone.layer2', 'neck', 'backbone'])
def test_manifold_mixup(layer):
    model = build()
    images = model.data_preprocessor(batch(), True)['inputs']
    seen = []
    probe = model.get_submodule(layer).register_forward_hook(lambda m, i, out: seen.append(out))
    model.extract_feat(images)
    probe.remove()
    hook, runner = MixupHook(layer=layer), stub(model)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    data = model.data_preprocessor(batch(), True)
    assert torch.equal(data['inputs'], images)  # pixels stay
    model.get_submodule(layer).register_forward_hook(lambda m, i, out: seen.append(out))
    losses = model.loss(data['inputs'], data['data_samples'])
    mix = draw_mix(np.random.default_rng([5, 0, 7]), 1.5, 3)
    before, after = (item if isinstance(item, tuple) else (item,) for item in seen)
    for x, mixed in zip(before, after, strict=True):
        torch.testing.assert_close(mixed, mix.lam * x + (1 - mix.lam) * x[list(mix.partner)])
    assert all(torch.isfinite(sum(value)) for value in losses.values())
    hook.after_train_iter(runner)
    model.extract_feat(images)  # as validation would
    assert torch.equal(*[(s[0] if isinstance(s, tuple) else s) for s in (seen[0], seen[2])])


def test_a_layer_that_is_not_run_is_an_error():
    model = build()
    model.backbone.spare = torch.nn.Identity()
    hook, runner = MixupHook(layer='backbone.spare'), stub(model)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    data = model.data_preprocessor(batch(), True)
    model.loss(data['inputs'], data['data_samples'])
    with pytest.raises(InputError, match=r"`MixupHook.layer='backbone.spare'` took no part"):
        hook.after_train_iter(runner)


@pytest.mark.parametrize('layer', [None, 'backbone.layer1'])
def test_autocast(layer):
    model = build()
    hook, runner = MixupHook(layer=layer), stub(model)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    with torch.autocast('cpu', torch.bfloat16):
        data = model.data_preprocessor(batch(), True)
        losses = model.loss(data['inputs'], data['data_samples'])
    total = sum(sum(value) for value in losses.values())
    total.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.isfinite(total) and all(torch.isfinite(grad).all() for grad in grads)


# ---- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('keys', 'message'),
    [
        (dict(alpha=0), '`MixupHook.alpha` must be a number above 0, found 0'),
        (dict(alpha=float('nan')), 'MixupHook.alpha'),
        (dict(mute_epoch=1, mute_iteration=1), '`MixupHook.mute_epoch` or .* found both'),
        (dict(mute_iteration=-1), '`MixupHook.mute_iteration` must be a whole number'),
    ],
)
def test_bad_arguments(keys, message):
    with pytest.raises(InputError, match=message):
        MixupHook(**keys)


@pytest.mark.parametrize(
    ('hook', 'keys', 'message'),
    [
        (mixup(mute_epoch=2), {}, r'`MixupHook.mute_epoch` must lie before .* 2 epochs'),
        (mixup(), {'train_dataloader.batch_size': 1}, r'batch_size` must be at least 2, found 1'),
        (mixup(layer='backbone.layer9'), {}, r"backbone.layer2, .*neck.*; found 'backbone.layer9'"),
        (mixup(layer='bbox_head'), {}, 'must name a module of the backbone or neck'),
        (
            mixup(),
            {'model.bbox_head.type': 'PISARetinaHead'},
            'in `model.bbox_head`, a PISARetinaHead: use RPNHead, RetinaHead',
        ),
    ],
)
def test_bad_configs_stop_before_training(folder, tmp_path, hook, keys, message):
    with pytest.raises(InputError, match=message):
        train(config(folder, tmp_path, [hook], **keys))
    assert InputRecorder.inputs == []
