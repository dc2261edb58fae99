"""Heads and losses that do not fit stop before training, with the head to use."""

import pytest
import torch
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_lt.engine.compatibility.cell import STATISTICS, losses
from mmdet_lt.engine.compatibility.families import tiny_config
from mmdet_lt.engine.hooks.class_counts import check_class_counts
from mmdet_lt.engine.hooks.head_checks import RULES, check_head, rule_of, score_rule
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
        ('YOLOF', 'LDAMLoss', 'objectness; use another head or loss'),
        ('Conditional DETR', 'LDAMLoss', "'mmdet_lt.LTConditionalDETRHead'"),
        ('Deformable DETR, two-stage', 'EQLLoss', 'label of class 0'),
        ('DINO', 'EQLv2Loss', "denoising queries.*'mmdet_lt.LTDINOHead'"),
        ('DDQ', 'EQLv2Loss', "denoising queries.*'mmdet_lt.LTDDQDETRHead'"),
        ('Mask2Former', 'EQLLoss', "'mmdet_lt.LTMask2FormerHead'"),
        ('Double-Head', 'EQLLoss', "6 columns, the loss needs 5.*'mmdet_lt.LTDoubleConv"),
        ('SABL', 'EQLv2Loss', "'mmdet_lt.LTSABLHead'"),
        ('Sparse R-CNN', 'GumbelLoss', r"roi_head.bbox_head\[0\].type='mmdet_lt.LTDIIHead'"),
        ('GFL', 'SeesawLoss', 'use it in an RoI head'),
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


def test_rules_of_classes_nobody_listed():
    class Below(RetinaHead):
        pass

    class OwnRule(BaseDenseHead):
        def __init__(self):
            nn.Module.__init__(self)

        def loss_by_feat(self):
            pass

        def _predict_by_feat_single(self):
            pass

    assert rule_of(Below.__new__(Below)) is RULES['RetinaHead']
    rule = rule_of(OwnRule())
    assert (rule.sigmoid, rule.softmax) == ('plain', 'no')


def test_every_head_of_mmdetection_has_a_rule():
    """Those that take `loss_cls`; RPNs have a class of their own."""
    from mmdet.models import dense_heads

    heads = [getattr(dense_heads, name) for name in dense_heads.__all__]
    without = {
        cls.__name__
        for cls in heads
        if 'RPN' not in cls.__name__ and not any(c.__name__ in RULES for c in cls.__mro__)
    }
    assert without <= {
        'AnchorFreeHead',
        'AnchorHead',
        'BoxInstMaskHead',
        'CondInstMaskHead',
        'FeatureAdaption',
        'YOLACTProtonet',
    }


def test_losses_of_other_packages_are_left_alone():
    head = nn.Module()
    head.loss_cls = torch.nn.CrossEntropyLoss()
    check_head(head, 'bbox_head', head)
