"""Heads and losses that do not fit stop before training, with the head to use."""

import inspect

import pytest
import torch
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_lt.engine.compatibility.cell import STATISTICS, losses
from mmdet_lt.engine.compatibility.families import tiny_config
from mmdet_lt.engine.hooks._head_rules import RULES, rule_of
from mmdet_lt.engine.hooks.class_counts import check_class_counts
from mmdet_lt.engine.hooks.head_checks import check_head, score_rule
from mmdet_lt.errors import InputError

C = 5
LOSSES = {cls.__name__: cls for cls in losses()}


def check(family, loss, adapted=False, change=None, **kwargs):
    options = dict(type=f'mmdet_lt.{loss}', use_sigmoid=LOSSES[loss].sigmoid)
    config = tiny_config(family, options, adapted)
    if change is not None:
        change(config)
    init_default_scope('mmdet')
    check_class_counts(MODELS.build(config), STATISTICS, **kwargs)


@pytest.mark.parametrize(
    ('family', 'loss', 'message'),
    [
        ('TOOD', 'EQLLoss', "probabilities.*`model.bbox_head.type='mmdet_lt.LTTOODHead'`"),
        ('YOLOX', 'EQLLoss', "its positives only.*'mmdet_lt.LTYOLOXHead'"),
        ('YOLOX', 'LDAMLoss', "its positives only.*'mmdet_lt.LTYOLOXHead'"),
        ('GFL', 'GumbelLoss', "the sigmoid of every logit.*'mmdet_lt.LTGFLHead'"),
        ('GFL', 'LDAMLoss', "'mmdet_lt.LTGFLHead'"),
        ('RTMDet', 'GumbelLoss', "'mmdet_lt.LTRTMDetSepBNHead'"),
        ('VFNet', 'LDAMLoss', "no background column.*'mmdet_lt.LTVFNetHead'"),
        ('PAA', 'BalancedSoftmaxLoss', "'mmdet_lt.LTPAAHead'"),
        ('YOLOF', 'GumbelLoss', "no gradient.*'mmdet_lt.LTYOLOFHead'"),
        ('YOLOF', 'LDAMLoss', 'objectness; use a detector with RetinaHead, or a sigmoid loss'),
        ('Conditional DETR', 'LDAMLoss', "'mmdet_lt.LTConditionalDETRHead'"),
        ('Deformable DETR, two-stage', 'EQLLoss', 'label of class 0'),
        ('DINO', 'EQLv2Loss', "denoising queries.*'mmdet_lt.LTDINOHead'"),
        ('DDQ', 'EQLv2Loss', "denoising queries.*'mmdet_lt.LTDDQDETRHead'"),
        ('Mask2Former', 'EQLLoss', "'mmdet_lt.LTMask2FormerHead'"),
        ('Double-Head', 'EQLLoss', "6 columns, the loss needs 5.*'mmdet_lt.LTDoubleConv"),
        ('SABL', 'EQLv2Loss', "'mmdet_lt.LTSABLHead'"),
        ('Sparse R-CNN', 'GumbelLoss', r"roi_head.bbox_head\[0\].type='mmdet_lt.LTDIIHead'"),
        ('GFL', 'SeesawLoss', 'use it in an RoI head such as Shared2FCBBoxHead'),
        ('RTMDet', 'GHMCLoss', "a second time; set .*'mmdet_lt.LTRTMDetSepBNHead'"),
        ('DINO', 'LDAMLoss', 'use a detector with mmdet_lt.LTDeformableDETRHead, or a sigmoid'),
        ('Conditional DETR', 'LOCELoss', "takes sigmoids; .*'mmdet_lt.LTConditionalDETRHead'"),
        ('Sparse R-CNN', 'LOCELoss', r"takes sigmoids; .*bbox_head\[0\].type='mmdet_lt.LTDIIHead'"),
        ('PISA', 'EQLLoss', "ScoreHLRSampler.*'mmdet_lt.OHEMSampler'.*'StandardRoIHead'"),
        ('PISA', 'LDAMLoss', 'ScoreHLRSampler ranks by a softmax'),
        ('FoveaBox', 'LDAMLoss', 'use a detector with FCOSHead, or a sigmoid loss'),
    ],
)
def test_refused(family, loss, message):
    with pytest.raises(InputError, match=message) as error:
        check(family, loss)
    assert str(error.value).count('\n') == 0


def test_accepted_by_the_stock_head():
    for family, loss in [('GFL', 'EQLLoss'), ('DINO', 'EQLLoss'), ('SABL', 'LOCELoss')]:
        check(family, loss)


def test_tood_that_counts_epochs_in_an_iteration_loop():
    def change(config):
        config.train_cfg.initial_epoch = 4

    check('TOOD', 'EQLLoss', adapted=True, change=change)
    check('TOOD', 'EQLLoss', adapted=True, by_epoch=False)  # starts at once
    with pytest.raises(InputError, match='initial_loss_cls=None.*initial_epoch=0'):
        check('TOOD', 'EQLLoss', adapted=True, change=change, by_epoch=False)


def test_mask2former_needs_its_fusion_head_and_class_weights():
    def stock_fusion(config):
        config.panoptic_fusion_head.type = 'MaskFormerFusionHead'

    with pytest.raises(InputError, match="panoptic_fusion_head.type='mmdet_lt.LTMaskFormer"):
        check('Mask2Former', 'EQLLoss', adapted=True, change=stock_fusion)

    def no_weights(config):
        config.panoptic_head.loss_cls.class_weight = None

    with pytest.raises(InputError, match='class_weight` must be a list of C'):
        check('Mask2Former', 'BalancedSoftmaxLoss', change=no_weights)
    check('Mask2Former', 'BalancedSoftmaxLoss', adapted=True, change=no_weights)


@pytest.mark.parametrize('cls', LOSSES.values(), ids=LOSSES)
def test_score_rule(cls):
    rule = score_rule(cls(), C)
    own = ('GumbelLoss', 'LDAMLoss', 'SeesawLoss', 'GroupSoftmaxLoss')
    assert rule == ('own' if cls.__name__ in own else 'plain')


@pytest.mark.parametrize('family', ['Double-Head', 'Faster R-CNN'])
def test_a_classifier_that_would_be_ignored(family):
    def cosine(config):
        config.roi_head.bbox_head.cls_predictor_cfg = dict(type='mmdet_lt.CosineLinear')

    if family == 'Faster R-CNN':
        return check(family, 'LOCELoss', change=cosine)
    with pytest.raises(InputError, match="ignores.*CosineLinear.*'mmdet_lt.LTDoubleConv"):
        check(family, 'LOCELoss', change=cosine)
    return check(family, 'LOCELoss', adapted=True, change=cosine)


# ---- what stands around a head ---------------------------------------------------------------


def to_softmax_cost(config):
    for cost in config.train_cfg.assigner.match_costs:
        if cost.type == 'FocalLossCost':
            cost.type = 'ClassificationCost'
            cost.pop('alpha', None)


def test_a_matcher_must_take_the_scores_of_the_loss():
    check('DETR', 'EQLLoss')
    with pytest.raises(InputError, match='a softmax; write `FocalLossCost`'):
        check('DETR', 'EQLLoss', change=to_softmax_cost)
    with pytest.raises(InputError, match='takes sigmoids'):
        check('Conditional DETR', 'BalancedSoftmaxLoss')
    check('Conditional DETR', 'BalancedSoftmaxLoss', change=to_softmax_cost)
    check('Conditional DETR', 'BalancedSoftmaxLoss', adapted=True)
    check('MaskFormer', 'BalancedSoftmaxLoss')  # its FocalLossCost compares masks


def test_samplers_need_one_loss_a_row():
    def hard(name):
        def change(config):
            config.train_cfg.rcnn.sampler = dict(type=name, num=32, pos_fraction=0.25)

        return change

    with pytest.raises(InputError, match="sampler.type='mmdet_lt.OHEMSampler'"):
        check('Faster R-CNN', 'EQLLoss', change=hard('OHEMSampler'))
    check('Faster R-CNN', 'BalancedSoftmaxLoss', change=hard('OHEMSampler'))
    check('Faster R-CNN', 'EQLLoss', change=hard('mmdet_lt.OHEMSampler'))


def test_pisa_weights_boxes_by_the_scores_of_the_loss():
    def random(config, **carl):
        config.train_cfg.rcnn.sampler.update(type='RandomSampler')
        for name in ('k', 'bias'):
            config.train_cfg.rcnn.sampler.pop(name, None)
        config.train_cfg.rcnn.carl.update(carl)

    for loss in ('EQLLoss', 'LDAMLoss', 'SeesawLoss'):
        with pytest.raises(InputError, match=r"rcnn.carl.*roi_head.type='StandardRoIHead'"):
            check('PISA', loss, change=random)
    check('PISA', 'LOCELoss', change=random)
    check('PISA', 'EQLLoss', change=lambda config: random(config, sigmoid=True))
    with pytest.raises(InputError, match='rcnn.carl'):  # its score has an objectness in it
        check('PISA', 'EQLv2Loss', change=lambda config: random(config, sigmoid=True))


class SoftTeacher(nn.Module):
    def __init__(self, detector):
        super().__init__()
        self.student = detector


@pytest.mark.parametrize('loss', ['EQLLoss', 'EQLv2Loss', 'LOCELoss'])
def test_soft_teacher_weights_background_by_its_score(loss):
    init_default_scope('mmdet')
    options = dict(type=f'mmdet_lt.{loss}', use_sigmoid=LOSSES[loss].sigmoid)
    model = SoftTeacher(MODELS.build(tiny_config('Faster R-CNN', options, False)))
    if loss == 'EQLLoss':
        with pytest.raises(InputError, match=r'model\.detector\.roi_head.*EQLv2Loss'):
            check_class_counts(model, STATISTICS)
    else:
        check_class_counts(model, STATISTICS)


def test_losses_in_an_rpn():
    def rpn(name):
        def change(config):
            config.rpn_head.loss_cls = dict(
                type=f'mmdet_lt.{name}', use_sigmoid=LOSSES[name].sigmoid
            )

        return change

    check('Faster R-CNN', 'EQLLoss', change=rpn('FocalLoss'))
    with pytest.raises(InputError, match='`model.rpn_head.loss_cls` balances classes'):
        check('Faster R-CNN', 'EQLLoss', change=rpn('EQLLoss'))
    with pytest.raises(InputError, match='RPNHead has room for one at most'):
        check('Faster R-CNN', 'EQLLoss', change=rpn('SeesawLoss'))


def test_losses_in_other_places():
    def objectness(config):
        config.bbox_head.loss_obj = dict(type='mmdet_lt.FocalLoss', use_sigmoid=True)

    with pytest.raises(InputError, match='`model.bbox_head.loss_obj` is a FocalLoss'):
        check('YOLOX', 'EQLLoss', adapted=True, change=objectness)

    def initial(config):
        config.bbox_head.initial_loss_cls = dict(type='mmdet_lt.FocalLoss', use_sigmoid=True)
        if config.bbox_head.type == 'TOODHead':
            config.bbox_head.loss_cls = dict(
                type='QualityFocalLoss', use_sigmoid=True, activated=True
            )

    with pytest.raises(InputError, match='probabilities.*LTTOODHead'):
        check('TOOD', 'EQLLoss', change=initial)
    check('TOOD', 'EQLLoss', adapted=True, change=initial)


def test_head_without_class_count():
    head = nn.Module()
    head.loss_cls = LOSSES['EQLLoss']()
    with pytest.raises(InputError, match='has no `num_classes`'):
        check_class_counts(nn.ModuleDict({'bbox_head': head}), STATISTICS)


def test_without_statistics_heads_and_losses_are_compared():
    def count(config):
        config.roi_head.bbox_head.loss_cls.num_classes = 7

    init_default_scope('mmdet')
    for change, match in ((count, 'num_classes` is 5, .* is 7: make'), (None, None)):
        config = tiny_config(
            'Faster R-CNN', dict(type='mmdet_lt.EQLv2Loss', use_sigmoid=True), False
        )
        if change is None:
            check_class_counts(MODELS.build(config), None)
            continue
        change(config)
        with pytest.raises(InputError, match=match):
            check_class_counts(MODELS.build(config), None)


# ---- the rules -------------------------------------------------------------------------------


def ddod(loss):
    init_default_scope('mmdet')
    anchors = dict(
        type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8]
    )
    config = dict(
        type='DDODHead',
        num_classes=C,
        in_channels=8,
        feat_channels=8,
        norm_cfg=dict(type='GN', num_groups=4),
        anchor_generator=anchors,
        loss_cls=dict(type=f'mmdet_lt.{loss}', use_sigmoid=LOSSES[loss].sigmoid),
    )
    return nn.ModuleDict({'bbox_head': MODELS.build(config)})


def test_ddod_assigns_by_sigmoids():
    check_class_counts(ddod('EQLLoss'), STATISTICS)
    for loss in ('BalancedSoftmaxLoss', 'GumbelLoss'):
        with pytest.raises(InputError, match='assigner takes sigmoids.*with ATSSHead'):
            check_class_counts(ddod(loss), STATISTICS)


def test_rules_of_classes_nobody_listed():
    class Below(RetinaHead):
        def _init_layers(self):
            pass

    class OwnScores(RetinaHead):
        def _predict_by_feat_single(self):
            pass

    class FurtherBelow(OwnScores):
        pass

    class OwnRule(BaseDenseHead):
        def loss_by_feat(self):
            pass

    class OwnBox(Shared2FCBBoxHead):
        def loss(self):
            pass

    def of(cls):
        return rule_of(cls.__new__(cls))

    assert of(Below) is RULES['RetinaHead']
    for cls in (OwnScores, FurtherBelow, OwnRule, OwnBox):
        rule = of(cls)
        assert (rule.sigmoid, rule.softmax) == ('no', 'no')
        assert 'follows_loss = True' in rule.why
    assert 'OwnScores._predict_by_feat_single' in of(FurtherBelow).why
    assert of(OwnBox).instead == 'Shared2FCBBoxHead'


def test_a_head_of_the_user_says_what_it_does():
    class OwnScores(RetinaHead):
        def _predict_by_feat_single(self, *args, **kwargs):
            return super()._predict_by_feat_single(*args, **kwargs)

    def change(config):
        config.bbox_head.type = OwnScores

    with pytest.raises(InputError, match='set `follows_loss = True` in the class.*RetinaHead'):
        check('RetinaNet', 'EQLLoss', change=change)
    OwnScores.follows_loss = True
    check('RetinaNet', 'EQLLoss', change=change)


def test_every_head_of_mmdetection_has_a_rule():
    """Those that take `loss_cls`, of either stack; that of re-identification has none."""
    import mmdet.models  # noqa: F401

    heads = {
        cls
        for cls in MODELS.module_dict.values()
        if isinstance(cls, type)
        and cls.__module__.startswith('mmdet.models')
        and not inspect.isabstract(cls)
    }
    taking = [
        cls
        for cls in heads
        if any('loss_cls' in inspect.signature(c.__init__).parameters for c in cls.__mro__[:-1])
    ]
    assert len(taking) > 50
    without = {cls.__name__ for cls in taking if 'follows_loss' in rule_of(cls.__new__(cls)).why}
    assert without == {'LinearReIDHead'}


def test_refusals_name_a_head_that_exists():
    init_default_scope('mmdet')
    for name, rule in RULES.items():
        for head in (rule.instead, rule.use and f'mmdet_lt.{rule.use}'):
            assert not head or MODELS.get(head) is not None, name


def test_losses_of_other_packages_are_left_alone():
    head = nn.Module()
    head.loss_cls = torch.nn.CrossEntropyLoss()
    check_head(head, 'bbox_head', head)
