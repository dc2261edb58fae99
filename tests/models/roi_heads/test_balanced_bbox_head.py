"""Balanced box heads: start from class shares, objectness column, memory of agnostic outputs."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmdet_lt import ClassStatistics
from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.cosine_linear import CosineLinear
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss
from mmdet_lt.registry import MODELS as OURS

C = 4
BOXES = [100, 20, 5, 0]  # a class without a box counts as one
STATISTICS = ClassStatistics([f'c{i}' for i in range(C)], [50, 10, 5, 0], BOXES, 60)
SHARE = torch.tensor([100.0, 20, 5, 1]) / 126
SIGMOID = sorted(
    name
    for name, cls in OURS.module_dict.items()
    if isinstance(cls, type) and issubclass(cls, SigmoidLoss)
)


def build(loss, statistics=STATISTICS, num_classes=C, **kwargs):
    init_default_scope('mmdet')
    if isinstance(loss, str):
        loss = dict(type=f'mmdet_lt.{loss}')
    config = dict(
        type='mmdet_lt.BalancedShared2FCBBoxHead',
        in_channels=4,
        fc_out_channels=8,
        roi_feat_size=2,
        num_classes=num_classes,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=loss,
        loss_bbox=dict(type='L1Loss'),
    )
    head = MODELS.build({**config, **kwargs})
    if statistics is not None:
        for module in head.modules():
            if hasattr(module, 'set_class_statistics'):
                module.set_class_statistics(statistics)
    return head


def scores(head):
    """What an untrained head answers to features of zeros: the bias alone."""
    with torch.no_grad():
        logits = head.fc_cls(torch.zeros(1, 8))
        if head.custom_activation:
            return logits, head.loss_cls.get_activation(logits)[0]
        return logits, logits.softmax(-1)[0]


@pytest.mark.parametrize('kind', ['CrossEntropyLoss', 'mmdet_lt.LDAMLoss'])
def test_softmax_starts_from_the_shares(kind):
    head = build(dict(type=kind), prior_foreground=0.25)
    head.init_weights()
    torch.testing.assert_close(scores(head)[1], torch.cat([SHARE * 0.25, torch.tensor([0.75])]))


def test_seesaw_starts_from_the_shares():
    head = build('SeesawLoss', prior_foreground=0.25)
    head.init_weights()
    logits, found = scores(head)
    assert logits.shape[1] == C + 2
    torch.testing.assert_close(found, torch.cat([SHARE * 0.25, torch.tensor([0.75])]))


@pytest.mark.parametrize('kind', ['BCELoss', 'EQLLoss', 'GumbelLoss', 'FocalLoss'])
def test_sigmoids_start_from_the_shares(kind):
    head = build(kind, prior_foreground=0.25)
    head.init_weights()
    torch.testing.assert_close(scores(head)[1][:C], SHARE * 0.25)


def test_objectness_starts_from_background():
    head = build('EQLv2Loss', prior_foreground=0.25)
    head.init_weights()
    logits, found = scores(head)
    torch.testing.assert_close(logits[0, :C].sigmoid(), SHARE * 0.25)
    torch.testing.assert_close(logits[0, C].sigmoid(), torch.tensor(0.75))
    torch.testing.assert_close(found[:C], SHARE * 0.25 * 0.25)


def test_groups_start_from_what_each_group_sees():
    """Two groups by box count: {0, 1} and {2, 3}; three rows of others for each member."""
    loss = dict(type='mmdet_lt.GroupSoftmaxLoss', bin_split=(10,), beta=3.0)
    head = build(loss, prior_foreground=0.25)
    head.init_weights()
    logits, found = scores(head)
    rare, frequent, last = (part.softmax(-1)[0] for part in logits.split([3, 3, 2], 1))
    torch.testing.assert_close(rare, torch.tensor([3 / 4, 5 / 6 / 4, 1 / 6 / 4]))
    torch.testing.assert_close(frequent, torch.tensor([3 / 4, 100 / 120 / 4, 20 / 120 / 4]))
    torch.testing.assert_close(last, torch.tensor([0.25, 0.75]))
    assert found.shape == (C + 1,)


def test_the_prior_leaves_the_rest_of_the_initialisation():
    torch.manual_seed(0)
    head = build('EQLv2Loss', prior_foreground=0.25)
    head.init_weights()
    assert 0.005 < head.fc_cls.weight.std() < 0.02 and head.fc_reg.weight.std() < 0.002
    assert head.shared_fcs[0].bias.abs().max() == 0  # Xavier, not torch's default
    plain = build('EQLv2Loss')
    plain.init_weights()
    assert plain.fc_cls.bias.abs().max() == 0


def test_bad_priors():
    with pytest.raises(InputError, match=r'prior_foreground` must lie in \(0, 1\), found 1'):
        build('EQLv2Loss', prior_foreground=1)
    with pytest.raises(InputError, match=r"prior_foreground` must lie in \(0, 1\), found '0\.2'"):
        build('EQLv2Loss', prior_foreground='0.2')
    with pytest.raises(InputError, match="objectness` must be True or False, found 'no'"):
        build('BCELoss', objectness='no')
    with pytest.raises(InputError, match='ClassStatisticsHook'):
        build('EQLv2Loss', statistics=None, prior_foreground=0.1).init_weights()
    predictor = dict(type='mmdet_lt.CosineLinear', bias=False)
    with pytest.raises(InputError, match='CosineLinear.*bias=True'):
        build('EQLv2Loss', prior_foreground=0.1, cls_predictor_cfg=predictor)
    head = build('BCELoss', statistics=None, prior_foreground=0.1, num_classes=3)
    head.set_class_statistics(STATISTICS)
    with pytest.raises(InputError, match=r'num_classes` is 3, .* 4 classes'):
        head.init_weights()


# ---- losses ----------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', SIGMOID)
def test_every_sigmoid_loss_takes_a_column_for_objectness(kind):
    plain, head = build(kind), build(kind, objectness=True)
    assert head.fc_cls.out_features == C + 1
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, C + 1, generator=generator)
    if kind == 'FocalLoss':
        assert not head.loss_cls.activated
    labels = torch.tensor([0, 1, 2, 3, C, C])
    torch.manual_seed(1)
    entries = head.loss_cls(z, labels, reduction_override='none')
    assert entries.shape == (6, C + 1) and torch.isfinite(entries).all()
    # Background rows teach the new column, foreground rows the opposite.
    z.requires_grad_(True)
    (gradient,) = torch.autograd.grad(head.loss_cls(z, labels), z)
    added = plain.fc_cls.out_features == C
    assert (gradient[4:, C] < 0).all() and (gradient[:4, C] >= 0).all()
    assert (gradient[:4, C] > 0).all() or not added
    found = head.loss_cls.get_activation(z.detach())
    link = head.loss_cls.link(z.detach())
    if head.loss_cls.score_times_objectness:
        torch.testing.assert_close(found[:, :C], link[:, :C] * (1 - link[:, C:]))
    torch.testing.assert_close(found[:, C], link[:, C])
    if added and kind != 'GHMCLoss':  # classes learn as they did; GHM-C counts all entries
        torch.manual_seed(1)
        alone = plain.loss_cls(z.detach()[:, :C], labels, reduction_override='none')
        torch.testing.assert_close(entries[:, :C].detach(), alone)


def test_objectness_is_for_sigmoids():
    with pytest.raises(InputError, match='objectness=True.*BalancedSoftmaxLoss'):
        build('BalancedSoftmaxLoss', objectness=True)


@pytest.mark.parametrize('kind', ['CrossEntropyLoss', 'FocalLoss', 'EQLV2Loss'])
def test_sigmoids_that_would_be_tested_with_a_softmax_are_refused(kind):
    with pytest.raises(InputError, match=rf'loss_cls` \({kind}.*softmax'):
        build(dict(type=kind, use_sigmoid=True, **({'num_classes': C} if kind[:2] == 'EQ' else {})))


@pytest.mark.parametrize('kind', ['EQLv2Loss', 'SeesawLoss', 'GroupSoftmaxLoss'])
def test_scores_at_test_are_those_of_the_loss(kind):
    predictor = dict(type='mmdet_lt.CosineLinear', learnable=True)
    head = build(kind, cls_predictor_cfg=predictor).eval()
    rois = torch.tensor([[0.0, 0, 0, 10, 10], [0, 20, 20, 40, 40]])
    features = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, deltas = head(features)
        result = head.predict_by_feat(
            (rois,),
            (logits,),
            (deltas,),
            [dict(img_shape=(64, 64), scale_factor=(1.0, 1.0))],
            rcnn_test_cfg=ConfigDict(
                score_thr=0.0, nms=dict(type='nms', iou_threshold=0.99), max_per_img=100
            ),
        )[0]
    assert isinstance(result, InstanceData) and len(result) == 2 * C
    expected = head.loss_cls.get_activation(logits)[:, :C].flatten().sort().values
    torch.testing.assert_close(result.scores.sort().values, expected)


# ---- heads that MMDetection builds without asking ---------------------------------------------

OTHERS = {
    'LTDoubleConvFCBBoxHead': dict(
        num_convs=1, num_fcs=1, conv_out_channels=8, fc_out_channels=8, with_avg_pool=True
    ),
    'LTSABLHead': dict(
        cls_in_channels=4,
        reg_in_channels=4,
        cls_out_channels=8,
        reg_offset_out_channels=4,
        reg_cls_out_channels=4,
        roi_feat_size=7,
        num_cls_fcs=1,
        in_channels=None,
        fc_out_channels=None,
        bbox_coder=dict(type='BucketingBBoxCoder', num_buckets=14, scale_factor=1.7),
        loss_bbox=None,
    ),
}


def build_other(kind, loss, **kwargs):
    options = {**OTHERS[kind], **kwargs}
    init_default_scope('mmdet')
    config = dict(
        type=f'mmdet_lt.{kind}',
        in_channels=4,
        roi_feat_size=2,
        num_classes=C,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type=f'mmdet_lt.{loss}'),
        loss_bbox=dict(type='L1Loss'),
    )
    config = {key: value for key, value in {**config, **options}.items() if value is not None}
    head = MODELS.build(config)
    for module in head.modules():
        if hasattr(module, 'set_class_statistics'):
            module.set_class_statistics(STATISTICS)
    return head


@pytest.mark.parametrize('kind', OTHERS)
def test_double_head_and_sabl_are_balanced_too(kind):
    predictor = dict(type='mmdet_lt.CosineLinear', temperature=7.0)
    head = build_other(kind, 'BCELoss', cls_predictor_cfg=predictor)
    assert type(head.fc_cls) is CosineLinear and head.fc_cls.temperature == 7
    assert head.fc_cls.out_features == C
    head = build_other(kind, 'BCELoss', objectness=True, prior_foreground=0.25)
    head.init_weights()
    logits, found = scores(head)
    assert logits.shape[1] == C + 1
    torch.testing.assert_close(logits[0].sigmoid(), torch.cat([SHARE * 0.25, torch.tensor([0.75])]))
    torch.testing.assert_close(found[:C], SHARE * 0.25 * 0.25)
    with pytest.raises(InputError, match='objectness=True.*SeesawLoss'):
        build_other(kind, 'SeesawLoss', objectness=True)


# ---- memory ----------------------------------------------------------------------------------


def test_class_agnostic_outputs():
    base = 'configs/lvis/mask-rcnn_r50_fpn_eqlv2{}_random-ms-1x_lvis-v1.py'
    sizes = {}
    for name in ('', '-agnostic'):
        cfg = Config.fromfile(base.format(name))
        init_default_scope('mmdet')
        with torch.device('meta'):
            head = MODELS.build(cfg.model.roi_head.bbox_head)
            mask = MODELS.build(cfg.model.roi_head.mask_head)
        sizes[name] = head.fc_reg.weight.numel(), mask.conv_logits.weight.numel()
    assert sizes[''] == (1024 * 4 * 1203, 256 * 1203)
    assert sizes['-agnostic'] == (1024 * 4, 256)
