"""Detectors of type SamplingFree: build, options, losses, thresholds, checkpoints."""

import copy
import math

import pytest
import torch
from mmdet.models.detectors import FCOS, RetinaNet
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from sampling_free_toy import BCE, batch, build, model_config, plain_model

from mmdet_lt import InputError
from mmdet_lt.models.detectors.sampling_free import sampling_free_class
from mmdet_lt.models.layers.guided_scaling import loss_value

KINDS = ('RetinaNet', 'FCOS', 'ATSS', 'GFL', 'FasterRCNN')


def test_a_switch_over_the_detector():
    init_default_scope('mmdet')
    plain = MODELS.build(ConfigDict(copy.deepcopy(plain_model('RetinaNet'))))
    model = build('RetinaNet')
    assert isinstance(model, RetinaNet) and type(model) is sampling_free_class(RetinaNet)
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(model.state_dict())
    assert extra and all(key.startswith('sampling_free.') for key in extra)
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in plain.named_parameters()]
    assert isinstance(build('FCOS'), FCOS)
    copy.deepcopy(model)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('objects', [2, 0])
def test_losses_are_guided_and_trainable(kind, objects):
    model = build(kind, prior=None, threshold=None, momentum=0.0, clamp=None)
    model.init_weights()
    model.train()
    inputs, samples = batch(objects)
    losses = model.loss(inputs, samples)
    total, logged = model.parse_losses(losses)
    total.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    group = 'roi' if kind == 'FasterRCNN' else 'dense'
    if objects:
        box = loss_value(losses['loss_bbox'])
        box = box + (loss_value(losses['loss_dfl']) if kind == 'GFL' else 0)
        factor = 2 if group == 'roi' else 1
        torch.testing.assert_close(loss_value(losses['loss_cls']), factor * box)
    elif group == 'dense':
        assert logged['guide_dense'] == 1
    if kind == 'FasterRCNN' and objects:
        torch.testing.assert_close(
            loss_value(losses['loss_rpn_cls']), loss_value(losses['loss_rpn_bbox'])
        )


def test_guiding_can_be_left_out():
    model = build('RetinaNet', prior=None, threshold=None, guided=False)
    inputs, samples = batch()
    model.eval()
    plain, guided = model.plain_loss(inputs, samples), model.loss(inputs, samples)
    assert set(plain) == set(guided)
    torch.testing.assert_close(plain, guided)


def test_generations():
    first, last, robust = (build('FCOS', generation=g) for g in ('2020', '2021', 'robust'))
    assert first.sampling_free.guide.momentum == 0 and first.sampling_free.guide.log_sigma is None
    guide = last.sampling_free.guide
    assert (guide.freeze_after, guide.guide_by, len(guide.log_sigma)) == (100, 'mean', 3)
    assert robust.sampling_free.guide.momentum == 0.9
    two = build('FasterRCNN', generation='2021').sampling_free
    assert two.guide.freeze_after is None and two.guide.log_sigma is None
    assert two.guide.factor.tolist() == [1, 2]


def test_published_priors_of_2021():
    for kind, layer, prior in (
        ('RetinaNet', 'bbox_head.retina_cls', 1e-5),
        ('FCOS', 'bbox_head.conv_cls', 1e-4),
        ('ATSS', 'bbox_head.atss_cls', 3e-3),
        ('FasterRCNN', 'rpn_head.rpn_cls', 1e-4),
    ):
        model = build(kind, generation='2021')
        model.init_weights()
        bias = model.get_submodule(layer).bias
        torch.testing.assert_close(bias, torch.full_like(bias, -math.log(1 / prior - 1)))
        if kind == 'FasterRCNN':
            assert (model.roi_head.bbox_head.fc_cls.bias == 0).all()
        model.train()
        model.loss(*batch())  # no hook needed
    with pytest.raises(InputError, match=r'no prior for `model\.bbox_head` \(GFLHead\)'):
        build('GFL', generation='2021')


def test_given_priors():
    priors = {'rpn_head': 0.01, 'roi_head.bbox_head': 0.02}
    model = build('FasterRCNN', prior=priors, threshold=1e-3)
    model.init_weights()
    assert model.rpn_head.rpn_cls.bias[0].item() == pytest.approx(-4.59512, abs=1e-5)
    shares = model.roi_head.bbox_head.fc_cls.bias.softmax(0)
    torch.testing.assert_close(shares, torch.tensor([0.02, 0.02, 0.02, 0.94]))
    with pytest.raises(InputError, match=r"names 'bbox_head': expected.*'rpn_head'"):
        build('FasterRCNN', prior={'bbox_head': 0.1})


@pytest.mark.parametrize('value', [0, 1, 1.5, -0.1, float('nan'), 'a', None, True, 0.34])
def test_impossible_priors_are_refused_at_once(value):
    refusal = r'(?=.*{})(?=.*\(0, 1\)).*found'
    roi = {'roi_head.bbox_head': value}  # three classes: 3 * 0.34 is above 1
    with pytest.raises(InputError, match=refusal.format('roi_head.bbox_head')):
        build('FasterRCNN', prior=roi, threshold=None)
    if value != 0.34:
        with pytest.raises(InputError, match=refusal.format('bbox_head')):
            build('RetinaNet', prior={'bbox_head': value}, threshold=None)


@pytest.mark.parametrize('kind', ['RetinaNet', 'FasterRCNN'])
@pytest.mark.parametrize('change', [dict(loss_bbox=dict(type='L1Loss', loss_weight=0)), {}])
def test_nothing_to_guide_by_is_refused_at_once(kind, change):
    config = model_config(kind)
    head = config.bbox_head if kind == 'RetinaNet' else config.roi_head.bbox_head
    head.update(change or (dict(with_reg=False) if kind == 'FasterRCNN' else {}))
    if kind == 'RetinaNet' and not change:
        config.detector, config.bbox_head = 'SOLO', None
        config.mask_head = dict(
            type='SOLOHead',
            num_classes=3,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            strides=[8, 16],
            scale_ranges=((1, 32), (16, 64)),
            num_grids=[8, 4],
            norm_cfg=None,
            loss_mask=dict(type='DiceLoss', use_sigmoid=True),
            loss_cls=BCE,
        )
    with pytest.raises(InputError, match=r'needs a localisation loss in `model\..*guided=False'):
        MODELS.build(config)
    config.sampling_free = dict(guided=False)
    MODELS.build(config)


def test_paa_predicts_with_class_thresholds():
    """Its score voting compares a table that has a column for background."""
    config = model_config('ATSS')
    config.detector = 'PAA'
    config.bbox_head.update(type='PAAHead', topk=4, score_voting=True)
    model = MODELS.build(config).eval()
    put_counts(model, {'bbox_head': [1, 1, 1, 1e6]})
    with torch.no_grad():
        found = model.predict(*batch())
    assert all(len(sample.pred_instances) for sample in found)


def test_training_without_a_measured_prior_is_refused():
    model = build('RetinaNet').train()
    with pytest.raises(InputError, match='OptimalBiasHook'):
        model.loss(*batch())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(piror='measure'), r"no key 'piror'.*'prior'"),
        (dict(generation='2019'), r"'2019'"),
        (dict(prior='measured'), r"prior` must be 'measure'.*found 'measured'"),
        (dict(prior=0.01), 'found 0.01'),
        (dict(momentum=1.0), r'momentum` must be in \[0, 1\)'),
        (dict(clamp=(2, 1)), 'low <= high'),
        (dict(freeze_after=0), 'freeze_after'),
        (dict(roi_factor=0), 'roi_factor'),
        (dict(guide_by='all'), 'guide_by'),
        (dict(threshold=2), 'threshold'),
        (dict(threshold='classes'), 'threshold'),
        (dict(guided='no'), 'guided'),
        (dict(guided=False, uncertainty=True), 'uncertainty'),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build('RetinaNet', **options)


@pytest.mark.parametrize('name', ['RetinaNot', 'ResNet', 'RetinaHead'])
def test_detector_must_be_one(name):
    init_default_scope('mmdet')
    with pytest.raises(InputError, match=f"`model.detector`.*'{name}'"):
        MODELS.build(dict(type='mmdet_lt.SamplingFree', detector=name))


def put_counts(model, rows):
    state = model.sampling_free.prior
    values = {head: [1.0] * len(state.rows(head)) for head in state.heads}
    state.put({**values, **rows}, dict(data=[1, 1], detector=[1, 1]))


@pytest.mark.parametrize('kind', ['RetinaNet', 'FCOS', 'ATSS', 'GFL', 'FasterRCNN'])
def test_class_thresholds_decide_at_test(kind):
    """A class whose threshold is above all scores vanishes, the others stay as they were."""
    model = build(kind)
    model.init_weights()
    model.eval()
    head = model.roi_head if kind == 'FasterRCNN' else model.bbox_head
    name = 'roi_head.bbox_head' if kind == 'FasterRCNN' else 'bbox_head'
    inputs, samples = batch()
    kept = head.test_cfg
    kept.max_per_img = 1000
    before = model.predict(inputs, copy.deepcopy(samples))
    # All rows foreground and of class 1: θ = (~0, 1, ~0), above every score of class 1.
    put_counts(model, {name: [0, 1e9, 0, 0]})
    after = model.predict(inputs, copy.deepcopy(samples))
    assert head.test_cfg is kept and kept.score_thr == 0.0
    labels = torch.cat([s.pred_instances.labels for s in before])
    assert (labels == 1).any()
    labels = torch.cat([s.pred_instances.labels for s in after])
    assert not (labels == 1).any() and {0, 2} <= set(labels.tolist())


def test_threshold_kinds():
    model = build('RetinaNet', threshold='prior', prior={'bbox_head': 0.02})
    parts = model.sampling_free
    assert parts.threshold('bbox_head', 0.5, 0.02).values.tolist() == pytest.approx([0.06] * 3)
    put_counts(model, {'bbox_head': [5, 3, 2, 90]})
    assert parts.threshold('bbox_head', 0.5, 0.02).values.tolist() == pytest.approx([0.1] * 3)
    model = build('RetinaNet')
    assert model.sampling_free.threshold('bbox_head', 0.5, None).values.tolist() == [0.5] * 3
    put_counts(model, {'bbox_head': [5, 3, 2, 90]})
    found = model.sampling_free.threshold('bbox_head', 0.5, None).values.tolist()
    assert found == pytest.approx([0.05, 0.03, 0.02])
    assert build('RetinaNet', threshold=None).sampling_free.threshold('x', 0.5, None) == 0.5
    assert build('RetinaNet', threshold=0.2).sampling_free.threshold('x', 0.5, None) == 0.2


def test_a_loaded_classifier_keeps_its_bias():
    priors = {'bbox_head': 0.1}
    trained = build('RetinaNet', prior=priors, threshold=None)
    with torch.no_grad():
        trained.bbox_head.retina_cls.bias.fill_(3)
    model = build('RetinaNet', prior=priors, threshold=None)
    assert model.write_priors(priors) == {'bbox_head.retina_cls': 'sigmoid'}
    model.load_state_dict(trained.state_dict())
    assert model.write_priors(priors) == {}
    assert (model.bbox_head.retina_cls.bias == 3).all()
    backbone = {k: v for k, v in trained.state_dict().items() if 'backbone' in k}
    model = build('RetinaNet', prior=priors, threshold=None)
    model.load_state_dict(backbone, strict=False)
    assert model.write_priors(priors) == {'bbox_head.retina_cls': 'sigmoid'}


def test_counts_travel_with_the_checkpoint():
    first, second = build('RetinaNet'), build('RetinaNet')
    put_counts(first, {'bbox_head': [5, 3, 2, 90]})
    second.load_state_dict(first.state_dict())
    second.train()
    second.loss(*batch())  # measured: no hook needed
    assert second.sampling_free.prior.prior('bbox_head') == pytest.approx(0.1 / 3)


def test_stages_of_a_cascade_are_groups():
    init_default_scope('mmdet')
    config = get_config('mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py').model
    config.backbone.init_cfg = None
    config.update(type='mmdet_lt.SamplingFree', detector=config.type)
    with torch.device('meta'):
        parts = MODELS.build(config).sampling_free
    assert parts.guide.groups == ('rpn', 's0', 's1', 's2')
    assert parts.prior.heads == ('rpn_head', *(f'roi_head.bbox_head.{s}' for s in range(3)))
