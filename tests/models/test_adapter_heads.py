"""What the adapters hand to the loss, to the assigner and to the test; against values by hand."""

import copy
import math

import pytest
import torch
from head_tools import Calls, build
from mmengine.structures import InstanceData

from mmdet_lt.engine.compatibility.cell import _uses_masks, batch
from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.head_scores import (
    class_scores,
    on_maps,
    sigmoid_logits,
    softmax_logits,
    uncounted,
)
from mmdet_lt.models.losses.balanced_softmax_loss import BalancedSoftmaxLoss
from mmdet_lt.models.losses.gumbel_loss import GumbelLoss
from mmdet_lt.models.losses.ldam_loss import LDAMLoss

C = 5


def loss_of(model, change=None):
    """Losses of one image; the graph is kept."""
    images, samples = batch(_uses_masks(model))
    if change is not None:
        change(samples[0])
    torch.manual_seed(0)
    return model.loss(images, samples)


# ---- logits that stock code turns into scores ------------------------------------------------


@pytest.mark.parametrize('cls', [GumbelLoss, LDAMLoss, BalancedSoftmaxLoss])
def test_stock_functions_of_the_logits_are_the_scores(cls):
    loss = cls(num_classes=C)
    z = 3 * torch.randn(7, 2, loss.dense_columns(C), generator=torch.Generator().manual_seed(0))
    if cls is GumbelLoss:
        wanted = torch.exp(-torch.exp(-z))
    else:
        wanted = (z * loss.scale).softmax(-1)[..., :C]
    torch.testing.assert_close(class_scores(loss, z), wanted)
    stock = sigmoid_logits(loss, z)
    assert stock.shape == z.shape
    torch.testing.assert_close(stock.sigmoid()[..., :C], wanted, rtol=1e-5, atol=1e-7)
    assert (stock.sigmoid()[..., C:] == 0).all()
    if cls is not GumbelLoss:
        again = softmax_logits(loss, z).softmax(-1)
        torch.testing.assert_close(again[..., :C], wanted, rtol=1e-4, atol=1e-6)


def test_scores_of_zero_and_one_stay():
    loss = GumbelLoss(num_classes=2)
    stock = sigmoid_logits(loss, torch.tensor([[-100.0, 100.0]]))
    assert stock.sigmoid().tolist() == [[0.0, 1.0]]


def test_maps_are_rows_of_each_anchor():
    maps = torch.arange(2 * 6 * 2 * 2.0).reshape(2, 6, 2, 2)  # two anchors, three columns
    seen = []
    same = on_maps(lambda rows: seen.append(rows) or rows, maps, 3)
    assert torch.equal(same, maps)
    wanted = maps.permute(0, 2, 3, 1).reshape(2, 2, 2, 2, 3).permute(0, 3, 1, 2, 4)
    assert torch.equal(seen[0], wanted)


def test_uncounted_puts_the_mode_back():
    loss = LDAMLoss(num_classes=C)
    with pytest.raises(ZeroDivisionError), uncounted(loss):
        assert not loss.training
        raise ZeroDivisionError
    assert loss.training


# ---- start -----------------------------------------------------------------------------------

START = [
    ('RetinaNet', 'retina_cls', False),
    ('VFNet', 'vfnet_cls', False),
    ('GFL', 'gfl_cls', True),
    ('TOOD', 'tood_cls', True),
    ('RTMDet', 'rtm_cls.0', True),
    ('YOLOX', 'multi_level_conv_cls.2', True),
    ('YOLOF', 'cls_score', True),
    ('Conditional DETR', 'fc_cls', True),
]


@pytest.mark.parametrize(('family', 'layer', 'adapted'), START)
def test_gumbel_starts_above_its_clamp(family, layer, adapted):
    """At MMDetection's bias, log(0.01 / 0.99), the loss has no gradient."""
    head = build(family, 'GumbelLoss', adapted).bbox_head
    bias = head.get_submodule(layer).bias
    torch.testing.assert_close(bias, torch.full_like(bias, -math.log(-math.log(6.1798e-4))))
    other = build(family, 'EQLLoss', adapted or family == 'TOOD').bbox_head
    bias = other.get_submodule(layer).bias
    torch.testing.assert_close(bias, torch.full_like(bias, math.log(0.01 / 0.99)))


def test_a_bias_in_the_config_is_kept():
    def change(config):
        override = dict(type='Normal', name='retina_cls', std=0.01, bias=-1.5)
        config.bbox_head.init_cfg = dict(type='Normal', layer='Conv2d', std=0.01, override=override)

    bias = build('RetinaNet', 'GumbelLoss', False, change=change).bbox_head.retina_cls.bias
    assert (bias == -1.5).all()


# ---- what each head does in training ---------------------------------------------------------


def test_gfl_weights_boxes_by_the_scores_of_the_loss():
    model = build('GFL', 'GumbelLoss')
    head = model.bbox_head
    torch.nn.init.normal_(head.gfl_cls.bias)
    seen, boxes = Calls(head.loss_cls), Calls(head.loss_bbox)
    loss_of(model)
    weights = torch.cat([kwargs['weight'] for _, kwargs in boxes.args])
    wanted = []
    for (z, (label, quality)), _ in seen.args:
        assert quality[label == C].eq(0).all()
        wanted.append(torch.exp(-torch.exp(-z[label < C])).max(1).values)
    assert len(weights)
    torch.testing.assert_close(weights, torch.cat(wanted), rtol=1e-4, atol=1e-6)


def test_tood_hands_on_logits_of_the_mean_and_scores_to_the_assigner():
    model = build('TOOD', 'EQLLoss')
    head = model.bbox_head
    logit, factor, seen = Calls(head.tood_cls), Calls(head.cls_prob_module), Calls(head.loss_cls)
    assigned = []
    assign = head.alignment_assigner.assign
    head.alignment_assigner.assign = lambda pred, *args: (
        assigned.append(pred.scores) or assign(pred, *args)
    )
    loss_of(model)
    p = [
        (a.sigmoid() * b.sigmoid()).sqrt()
        for a, b in zip(logit.outputs, factor.outputs, strict=True)
    ]
    p = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, C) for x in p])
    z = torch.cat([args[0] for args, _ in seen.args])
    torch.testing.assert_close(z, p.logit(), rtol=1e-4, atol=1e-4)
    inside = assigned[0]
    assert any(torch.allclose(inside[0], row, atol=1e-6) for row in p)


def test_tood_starts_with_the_initial_loss_on_logits():
    def change(config):
        config.train_cfg.initial_epoch = 4

    model = build('TOOD', 'EQLLoss', change=change)
    head = model.bbox_head
    assert type(head.initial_loss_cls).__module__.startswith('mmdet.')
    assert head.initial_loss_cls.activated is False
    initial, main = Calls(head.initial_loss_cls), Calls(head.loss_cls)
    loss_of(model)
    assert initial.args and not main.args
    assert (torch.cat([args[0] for args, _ in initial.args]) < 0).all()  # logits of about 0.01


@pytest.mark.parametrize('family', ['TOOD', 'RTMDet'])
def test_a_loss_with_its_own_divisor_is_not_divided_again(family):
    """The heads divide the sum of levels by the third value, clamped at 1."""
    divisors = {}
    for loss in ('EQLLoss', 'GHMCLoss'):
        head = build(family, loss).bbox_head
        head.epoch = 0  # TOOD reads it from the message hub, above this method
        for size in (4, 40):
            rows = size * size
            score = torch.randn(1, C, size, size, requires_grad=True)
            boxes, metric = torch.rand(1, rows, 4), torch.full((1, rows), 0.5)
            boxes[..., 2:] += 1
            label = torch.randint(0, C, (1, rows))
            weight = torch.ones(1, rows)
            values = [score, boxes, label, weight, boxes, metric, (8, 8)]
            if family == 'TOOD':
                shaped = boxes.reshape(1, size, size, 4).permute(0, 3, 1, 2)
                values = [boxes, score, shaped, *values[2:]]
            found = head.loss_by_feat_single(*values)
            divisors[loss, size] = float(found[2])
            assert found[3] > 1
    assert divisors['EQLLoss', 40] == 800 and divisors['EQLLoss', 4] == 8
    assert divisors['GHMCLoss', 40] == divisors['GHMCLoss', 4] == 0


def test_tood_may_use_one_loss_throughout():
    def change(config):
        config.train_cfg.initial_epoch = 4
        config.bbox_head.initial_loss_cls = None

    model = build('TOOD', 'EQLv2Loss', change=change)
    assert not any('initial_loss_cls' in key for key in model.state_dict())
    again = copy.deepcopy(model).bbox_head
    assert again.initial_loss_cls is again.loss_cls
    seen = Calls(model.bbox_head.loss_cls)
    loss_of(model)
    assert seen.args


def test_yolox_shows_every_point():
    model = build('YOLOX', 'EQLLoss')
    head = model.bbox_head
    seen = Calls(head.loss_cls)
    losses = loss_of(model)
    (z, target), kwargs = seen.args[0]
    assert len(seen.args) == 1
    assert z.shape == target.shape == (8 * 8 + 4 * 4 + 2 * 2, C)
    positives = (target > 0).any(1)
    assert 0 < positives.sum() < len(target)
    assert set(target[positives].argmax(1).tolist()) <= {0, 2, C - 1}
    assert target.max() <= 1 and (target > 0).sum() == positives.sum()
    assert kwargs['avg_factor'] == positives.sum()
    assert losses['loss_cls'].requires_grad and losses['loss_bbox'] > 0


def test_yolox_learns_background_from_an_empty_image():
    def no_objects(sample):
        sample.gt_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )

    for loss, sigmoid in (('GumbelLoss', True), ('BalancedSoftmaxLoss', False)):
        model = build('YOLOX', loss, use_sigmoid=sigmoid)
        losses = loss_of(model, no_objects)
        assert torch.isfinite(losses['loss_cls']) and losses['loss_cls'] > 0
        losses['loss_cls'].backward()
        assert model.bbox_head.multi_level_conv_cls[0].weight.grad.any()


def test_vfnet_leaves_background_what_the_classes_leave_over():
    model = build('VFNet', 'BalancedSoftmaxLoss', use_sigmoid=False)
    seen = Calls(model.bbox_head.loss_cls)
    loss_of(model)
    (z, target), _ = seen.args[0]
    assert z.shape[1] == C + 1 and target.shape[1] == C
    # The loss of a row without object is not 0.
    rows = (target.sum(1) == 0).nonzero()[:3, 0]
    loss = model.bbox_head.loss_cls
    assert (loss(z[rows], target[rows], reduction_override='none') > 0).all()


def test_paa_has_one_loss_a_candidate():
    pytest.importorskip('sklearn.mixture')
    model = build('PAA', 'BalancedSoftmaxLoss', use_sigmoid=False)
    head, losses = model.bbox_head, []
    reassign = head.paa_reassign
    head.paa_reassign = lambda values, *args: losses.append(values) or reassign(values, *args)
    seen = Calls(head.loss_cls)
    loss_of(model)
    (z, label, weight), kwargs = seen.args[0]
    assert kwargs['reduction_override'] == 'none'
    assert losses[0].shape == (len(z),) and losses[0].std() > 0
    by_class = head.loss_cls(z, label, weight, reduction_override='none')
    assert (losses[0] >= by_class - 1e-6).all()  # the rest is the loss of the box


@pytest.mark.parametrize(('family', 'counted', 'trained'), [('DINO', 2, 3), ('DDQ', 2, 6)])
def test_denoising_and_encoder_are_trained_and_not_counted(family, counted, trained):
    """Two decoder layers count. Not: their denoising, the encoder, DDQ's dense queries (2 + 1)."""
    model = build(family, 'EQLv2Loss')
    seen = Calls(model.bbox_head.loss_cls)
    losses = loss_of(model)
    assert seen.counting.count(True) == counted
    assert seen.counting.count(False) == trained
    assert {'enc_loss_cls', 'dn_loss_cls', 'd0.loss_cls', 'enc_loss_bbox'} <= set(losses)
    labels = torch.cat([args[1] for args, _ in seen.args if isinstance(args[1], torch.Tensor)])
    assert {0, 2, C - 1, C} == set(labels.tolist())


def test_two_stage_deformable_trains_its_encoder_without_classes():
    model = build('Deformable DETR, two-stage', 'EQLv2Loss')
    head = model.bbox_head
    seen, encoder = Calls(head.loss_cls), Calls(head.loss_enc)
    losses = loss_of(model)
    assert len(seen.args) == 2 and len(encoder.args) == 1
    assert set(encoder.args[0][0][1].tolist()) == {0, C}
    assert losses['enc_loss_cls'] > 0
    assert head.loss_cls is not head.loss_enc


def test_detr_matches_by_the_scores_of_the_loss():
    head = build('Conditional DETR', 'LDAMLoss', use_sigmoid=False).bbox_head
    z = torch.randn(4, C + 1, generator=torch.Generator().manual_seed(0)) / 10
    torch.testing.assert_close(
        head.matching_logits(z).sigmoid()[:, :C],
        (head.loss_cls.scale * z).softmax(1)[:, :C],
        rtol=1e-4,
        atol=1e-6,
    )


def test_mask2former_panoptic_decides_by_the_scores():
    fusion = build('Mask2Former', 'EQLLoss').panoptic_fusion_head
    fusion.test_cfg = dict(object_mask_thr=0.6, iou_thr=0.5, filter_low_score=True)
    scores = torch.tensor([[0.9, 0.8, 0, 0, 0], [0.1, 0.1, 0.5, 0, 0]])
    masks = torch.full((2, 4, 4), -9.0)
    masks[0, :2], masks[1, 2:] = 9, 9
    found = fusion.panoptic_postprocess(scores, masks).sem_seg[0]
    assert (found[:2] % 1000 == 0).all() and (found[2:] == C).all()  # 0.5 is below the threshold


# ---- what they refuse ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('family', 'loss', 'options', 'message'),
    [
        ('GFL', 'SeesawLoss', dict(use_sigmoid=False), 'needs 2 columns beside'),
        ('YOLOF', 'LDAMLoss', dict(use_sigmoid=False), 'sigmoid losses only'),
        ('DDQ', 'LDAMLoss', dict(use_sigmoid=False), 'sigmoid losses only'),
    ],
)
def test_refused_losses(family, loss, options, message):
    with pytest.raises(InputError, match=message):
        build(family, loss, **options)


@pytest.mark.parametrize(('family', 'path'), [('GFL', 'bbox_head'), ('SABL', 'roi_head.bbox_head')])
def test_losses_of_other_packages_are_refused(family, path):
    def change(config):
        for key in path.split('.'):
            config = config[key]
        config.loss_cls = dict(type='FocalLoss', use_sigmoid=True)
        if family == 'SABL':
            config.loss_cls = dict(type='CrossEntropyLoss', use_sigmoid=False)

    with pytest.raises(InputError, match=r"use `type='(GFLHead|SABLHead)'`"):
        build(family, 'EQLLoss', change=change)


def test_missing_use_sigmoid_is_named():
    def change(config):
        del config.bbox_head.loss_cls['use_sigmoid']

    for family in ('GFL', 'RTMDet', 'YOLOX', 'VFNet', 'TOOD'):
        with pytest.raises(InputError, match='use_sigmoid=True|initial_loss_cls'):
            build(family, 'EQLLoss', change=change)


def test_sigmoid_loss_needs_a_sigmoid_matcher():
    def change(config):
        config.train_cfg.assigner.match_costs[0] = dict(type='ClassificationCost', weight=2.0)

    with pytest.raises(InputError, match='write `FocalLossCost`'):
        build('Conditional DETR', 'EQLLoss', change=change)


def test_tood_refuses_a_sigmoid_start_of_a_softmax():
    def change(config):
        config.bbox_head.initial_loss_cls = dict(type='FocalLoss', use_sigmoid=True)

    with pytest.raises(InputError, match='initial_loss_cls=None'):
        build('TOOD', 'BalancedSoftmaxLoss', use_sigmoid=False, change=change)


def test_sparse_rcnn_needs_both_classes():
    def head_only(config):
        config.roi_head.type = 'SparseRoIHead'

    def roi_only(config):
        for head in config.roi_head.bbox_head:
            head.type = 'DIIHead'

    with pytest.raises(InputError, match="model.roi_head.type='mmdet_lt.LTSparseRoIHead'"):
        build('Sparse R-CNN', 'EQLLoss', change=head_only)
    with pytest.raises(InputError, match=r"bbox_head\[0\].type='mmdet_lt.LTDIIHead'"):
        build('Sparse R-CNN', 'EQLLoss', change=roi_only)
