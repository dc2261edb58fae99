"""Weights of single boxes in every family of heads, against stock heads and against numpy."""

import copy

import numpy as np
import pytest
import torch
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from toy_models import faster_rcnn, retinanet

from mmdet_lt.errors import InputError
from mmdet_lt.models.task_modules.box_weights import (
    disable_box_weights,
    enable_box_weights,
    set_box_weights,
)

C, LAM, SIZE = 3, 0.3, 128
BOX_A, BOX_B = [16.0, 16, 40, 40], [80.0, 64, 104, 88]  # a shift by whole strides


def detector(name):
    """A toy detector with one of the dense heads, or Faster and Mask R-CNN."""
    init_default_scope('mmdet')
    cfg = ConfigDict((faster_rcnn if name in ('faster_rcnn', 'mask_rcnn') else retinanet)(C))
    if name in ('atss', 'fcos'):
        shared = dict(
            num_classes=C,
            in_channels=16,
            stacked_convs=1,
            feat_channels=16,
            norm_cfg=None,
            loss_cls=dict(type='FocalLoss', use_sigmoid=True),
            loss_bbox=dict(type='IoULoss' if name == 'fcos' else 'GIoULoss'),
            loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True),
        )
    if name == 'atss':
        anchors = dict(cfg.bbox_head.anchor_generator, ratios=[1.0])
        cfg.bbox_head = dict(type='ATSSHead', anchor_generator=anchors, **shared)
        cfg.train_cfg = dict(
            assigner=dict(type='ATSSAssigner', topk=4), allowed_border=-1, pos_weight=-1
        )
    if name == 'fcos':
        ranges = ((-1, 32), (32, 1e8))
        cfg.bbox_head = dict(type='FCOSHead', strides=[8, 16], regress_ranges=ranges, **shared)
        cfg.train_cfg = None
    if name == 'mask_rcnn':
        cfg.type = 'MaskRCNN'
        cfg.roi_head.mask_roi_extractor = cfg.roi_head.bbox_roi_extractor
        cfg.roi_head.mask_head = dict(
            type='FCNMaskHead',
            num_convs=1,
            in_channels=16,
            conv_out_channels=16,
            num_classes=C,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True, loss_weight=2.0),
        )
        cfg.train_cfg.rcnn.mask_size = 10
    torch.manual_seed(0)
    return MODELS.build(cfg)


def truth(boxes, labels, weights=None):
    fields = {} if weights is None else dict(loss_weights=torch.tensor(weights))
    return InstanceData(
        bboxes=torch.tensor(boxes).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
        **fields,
    )


def dense_loss(head, logit, *instances, tilt=0.0):
    """Summed loss terms for one random box prediction and one class logit everywhere.

    ``tilt`` makes predictions of the right half, where box B is, differ from those of the left.
    """
    torch.manual_seed(1)
    outs = []
    with torch.no_grad():
        features = [torch.randn(len(instances), 16, SIZE // s, SIZE // s) for s in (8, 16)]
        for part in head(features):
            # Every image and place is the same, so that a shifted box meets equal predictions.
            outs.append([level[:1, :, 3:4, 3:4].expand_as(level).clone() for level in part])
        outs[0] = [torch.full_like(level, logit) for level in outs[0]]
        for level in sum(outs, []):
            level[..., level.shape[-1] // 2 :] *= 1 + tilt
    meta = dict(img_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE))
    losses = head.loss_by_feat(*outs, list(instances), [meta] * len(instances))
    return {k: sum(v) if isinstance(v, list) else v for k, v in losses.items()}


HEADS = {'retinanet': 'bbox_head', 'atss': 'bbox_head', 'fcos': 'bbox_head', 'rpn': 'rpn_head'}


def dense_head(name):
    model = detector('faster_rcnn' if name == 'rpn' else name)
    head = getattr(model, HEADS[name])
    if name == 'rpn':
        head.sampler.num, head.sampler.pos_fraction = 512, 1.0  # no positive is left out
    return model, head.train()


@pytest.mark.parametrize('name', HEADS)
def test_dense_loss_is_the_mix_of_two_losses(name):
    """With logits so low that background costs nothing, L = λ L1 + (1 - λ) L2 exactly."""
    model, head = dense_head(name)
    labels = [0, 0] if name == 'rpn' else [2, 0]
    first = dense_loss(head, -15.0, truth(BOX_A, labels[:1]), tilt=0.3)
    second = dense_loss(head, -15.0, truth(BOX_B, labels[1:]), tilt=0.3)
    heads = enable_box_weights(model)
    both = truth([BOX_A, BOX_B], labels, [LAM, 1 - LAM])
    mixed = dense_loss(head, -15.0, both, tilt=0.3)
    assert first['loss_cls' if name != 'rpn' else 'loss_rpn_cls'] > 0.02  # a positive at -15
    for key, value in mixed.items():
        assert value > 0 and abs(first[key] / second[key] - 1) > 1e-3
        torch.testing.assert_close(value, LAM * first[key] + (1 - LAM) * second[key])
    disable_box_weights(heads)
    assert type(head).__name__ in ('RetinaHead', 'ATSSHead', 'FCOSHead', 'RPNHead')


@pytest.mark.parametrize('name', HEADS)
def test_weight_one_changes_nothing(name):
    model, head = dense_head(name)
    labels = [0, 0] if name == 'rpn' else [2, 0]
    items = [truth([BOX_A, BOX_B], labels), truth([], [])]
    torch.manual_seed(0)
    stock = dense_loss(head, -1.0, *copy.deepcopy(items))
    enable_box_weights(model)
    for unweighted in (True, False):
        if not unweighted:
            for item in items:
                item.loss_weights = torch.ones(len(item))
        torch.manual_seed(0)
        mine = dense_loss(head, -1.0, *copy.deepcopy(items))
        assert stock.keys() == mine.keys()
        assert all(torch.equal(stock[key], mine[key]) for key in stock)


def test_background_weighs_one_in_retinanet():
    """Against numpy: (Σ_pos w l + Σ_neg l) / Σ_pos w, the box of an anchor found by its centre."""
    model, head = dense_head('retinanet')
    anchors = torch.cat(head.prior_generator.grid_priors([(16, 16), (8, 8)], device='cpu')).numpy()
    with torch.no_grad():
        targets = head.get_targets(
            *head.get_anchors([(16, 16), (8, 8)], [dict(pad_shape=(SIZE, SIZE))], 'cpu'),
            [truth([BOX_A, BOX_B], [2, 0])],
            [dict(img_shape=(SIZE, SIZE))],
        )
    label = torch.cat(targets[0], 1)[0].numpy()
    counted = torch.cat(targets[1], 1)[0].numpy() > 0
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    near_a = np.abs(centre - 28).max(1) < np.abs(centre - [92, 76]).max(1)
    weight = np.where(label < C, np.where(near_a, LAM, 1 - LAM), 1.0) * counted
    p = 1 / (1 + np.exp(1.0))  # logit -1 everywhere
    positive, negative = -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p)
    row = np.where(label < C, positive + (C - 1) * negative, C * negative)
    wanted = (weight * row).sum() / weight[label < C].sum()
    enable_box_weights(model)
    mixed = dense_loss(head, -1.0, truth([BOX_A, BOX_B], [2, 0], [LAM, 1 - LAM]))
    assert mixed['loss_cls'].item() == pytest.approx(wanted, rel=1e-5)


def results():
    """Two images: the first with boxes A and B (rows: A, B, B, 2 background), the second empty."""
    priors = torch.tensor([BOX_A, BOX_B, BOX_B, [0.0, 0, 9, 9], [50.0, 50, 60, 60]])

    def sampled(gt, priors, inds):
        boxes = torch.tensor([BOX_A, BOX_B])[:gt]
        assigned = InstanceData()
        assigned.gt_inds = torch.tensor(inds)
        assigned.labels = torch.tensor([-1, 2, 0])[assigned.gt_inds]
        positive, negative = (assigned.gt_inds > 0).nonzero(), (assigned.gt_inds == 0).nonzero()
        return SamplingResult(
            positive.flatten(), negative.flatten(), priors, boxes, assigned, torch.zeros(len(inds))
        )

    return [sampled(2, priors, [1, 2, 2, 0, 0]), sampled(0, priors[3:], [0, 0])]


def test_roi_head_against_numpy():
    model = detector('faster_rcnn')
    head, cfg = model.roi_head.bbox_head, model.roi_head.train_cfg
    rng = np.random.default_rng(0)
    z = rng.normal(size=(7, C + 1))
    delta = rng.normal(size=(7, C * 4))
    call = dict(
        cls_score=torch.tensor(z, dtype=torch.float32),
        bbox_pred=torch.tensor(delta, dtype=torch.float32),
        rois=torch.zeros(7, 5),
        rcnn_train_cfg=cfg,
    )
    heads = enable_box_weights(model)
    set_box_weights(heads, [torch.tensor([LAM, 1 - LAM]), torch.zeros(0)])
    losses = head.loss_and_target(sampling_results=results(), **call)['loss_bbox']
    label = np.array([2, 0, 0, C, C, C, C])
    weight = np.array([LAM, 1 - LAM, 1 - LAM, 1, 1, 1, 1])
    ce = np.log(np.exp(z).sum(1)) - z[np.arange(7), label]
    assert losses['loss_cls'].item() == pytest.approx((weight * ce).sum() / 7, rel=1e-5)
    # The proposals equal their boxes, so all targets are 0 and L1 is the size of the prediction.
    size = np.abs(delta.reshape(7, C, 4)[np.arange(3), label[:3]]).sum(1)
    assert losses['loss_bbox'].item() == pytest.approx((weight[:3] * size).sum() / 7, rel=1e-5)

    set_box_weights(heads, None)
    muted = head.loss_and_target(sampling_results=results(), **call)['loss_bbox']
    disable_box_weights(heads)
    stock = head.loss_and_target(sampling_results=results(), **call)['loss_bbox']
    assert torch.equal(muted['loss_cls'], stock['loss_cls'])
    assert stock['loss_cls'].item() == pytest.approx(ce.sum() / 7, rel=1e-5)


@pytest.mark.parametrize('weights', [[LAM, 1 - LAM], [1.0, 1.0]])
def test_mask_head_against_numpy(weights):
    model = detector('mask_rcnn')
    head, cfg = model.roi_head.mask_head, model.roi_head.train_cfg
    masks = np.zeros((2, SIZE, SIZE), np.uint8)
    masks[0, 16:40, 16:28] = 1  # the left half of box A
    masks[1, 64:88, 80:104] = 1  # all of box B
    items = [truth([BOX_A, BOX_B], [2, 0], weights), truth([], [], [])]
    items[0].masks = BitmapMasks(masks, SIZE, SIZE)
    items[1].masks = BitmapMasks(np.zeros((0, SIZE, SIZE), np.uint8), SIZE, SIZE)
    z = np.random.default_rng(0).normal(size=(3, C, 10, 10))
    pred = torch.tensor(z, dtype=torch.float32)
    stock = head.loss_and_target(pred, results(), items, cfg)['loss_mask']['loss_mask']
    enable_box_weights(model)
    mine = head.loss_and_target(pred, results(), items, cfg)['loss_mask']['loss_mask']
    target = np.ones((3, 10, 10))
    target[0, :, 5:] = 0
    chosen = z[[0, 1, 2], [2, 0, 0]]
    entry = (np.log1p(np.exp(chosen)) - target * chosen).mean((1, 2))
    row = np.array([weights[0], weights[1], weights[1]])
    assert mine.shape == stock.shape
    assert mine.item() == pytest.approx(2 * (row * entry).sum() / row.sum(), rel=1e-5)
    if weights == [1.0, 1.0]:
        assert torch.equal(mine, stock)

    empty = head.loss_and_target(pred[:0], results()[1:], items[1:], cfg)['loss_mask']['loss_mask']
    assert empty.item() == 0


def test_every_stage_of_a_cascade():
    """Weights of 1/2 halve the box losses of all stages; proposals and refinement are the same."""
    init_default_scope('mmdet')
    cfg = get_config('mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py').model
    cfg.backbone = dict(type='ResNet', depth=18, base_channels=8, norm_eval=True)
    cfg.neck.in_channels = [8, 16, 32, 64]
    for stage in cfg.roi_head.bbox_head:
        stage.update(num_classes=C, fc_out_channels=16)
    torch.manual_seed(0)
    model = MODELS.build(cfg).train()
    meta = dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE))

    def losses(weights):
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = truth([BOX_A, BOX_B], [2, 0], weights)
        torch.manual_seed(1)
        with torch.no_grad():
            return model.loss(torch.zeros(1, 3, SIZE, SIZE), [sample])

    stock = losses(None)
    heads = enable_box_weights(model)
    assert len(heads) == 4
    set_box_weights(heads, [torch.full((2,), 0.5)])
    half = losses([0.5, 0.5])
    for stage in range(3):
        assert stock[f's{stage}.loss_bbox'] > 0
        torch.testing.assert_close(half[f's{stage}.loss_bbox'], stock[f's{stage}.loss_bbox'] / 2)
        assert half[f's{stage}.loss_cls'] < stock[f's{stage}.loss_cls']
    torch.testing.assert_close(sum(half['loss_rpn_bbox']), sum(stock['loss_rpn_bbox']) / 2)


def refused(model):
    with pytest.raises(InputError, match='mixup') as caught:
        enable_box_weights(model)
    return str(caught.value)


def test_refuses_what_it_does_not_know():
    init_default_scope('mmdet')
    cfg = ConfigDict(retinanet(C))
    quality = dict(type='QualityFocalLoss', use_sigmoid=True)
    cfg.bbox_head = dict(cfg.bbox_head, type='GFLHead', loss_cls=quality)
    cfg.bbox_head.update(reg_max=4, loss_dfl=dict(type='DistributionFocalLoss'))
    cfg.bbox_head.update(loss_bbox=dict(type='GIoULoss'), norm_cfg=None)
    cfg.bbox_head.anchor_generator.ratios = [1.0]
    cfg.train_cfg = dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1)
    cfg.train_cfg.update(pos_weight=-1)
    model = MODELS.build(cfg)
    assert '`model.bbox_head`, a GFLHead: use RPNHead, RetinaHead' in refused(model)

    # Inherits from RetinaHead, but makes its loss without the targets of AnchorHead.
    cfg = ConfigDict(retinanet(C))
    cfg.bbox_head.update(type='FreeAnchorRetinaHead', loss_bbox=dict(type='SmoothL1Loss'))
    cfg.bbox_head.pop('loss_cls')
    assert 'a FreeAnchorRetinaHead' in refused(MODELS.build(cfg))

    cfg = ConfigDict(faster_rcnn(C))
    cfg.roi_head.bbox_head.loss_cls = dict(type='EQLV2Loss', num_classes=C)
    assert "use type='mmdet_lt.EQLv2Loss'" in refused(MODELS.build(cfg))

    cfg = ConfigDict(faster_rcnn(C))
    cfg.roi_head.type = 'PISARoIHead'
    cfg.train_cfg.rcnn.update(isr=dict(k=2, bias=0), carl=dict(k=1, bias=0.2))
    assert '`model.roi_head`, a PISARoIHead' in refused(MODELS.build(cfg))

    model = detector('mask_rcnn')
    model.roi_head.mask_head.loss_mask = torch.nn.BCEWithLogitsLoss()
    assert 'model.roi_head.mask_head.loss_mask' in refused(model)
    assert type(model.rpn_head).__name__ == 'RPNHead'  # a refusal changes nothing


def test_changed_heads_can_be_copied():
    model = detector('faster_rcnn')
    enable_box_weights(model)
    twin = copy.deepcopy(model)
    assert type(twin.rpn_head) is type(model.rpn_head)
    assert twin.state_dict().keys() == detector('faster_rcnn').state_dict().keys()
