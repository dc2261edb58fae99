"""OHEM with every loss, running statistics untouched; instance-balanced positives, none twice."""

import numpy as np
import pytest
import torch
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.models.task_modules.samplers import InstanceBalancedPosSampler as StockSampler
from mmdet.registry import MODELS, TASK_UTILS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from toy_models import faster_rcnn

from mmdet_lt import ClassStatistics
from mmdet_lt.engine.compatibility.cell import STATISTICS as FIVE
from mmdet_lt.engine.compatibility.cell import batch
from mmdet_lt.engine.compatibility.families import tiny_config
from mmdet_lt.engine.hooks.class_statistics_hook import prepare_model
from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.losses.running import RunningStatistics
from mmdet_lt.models.task_modules.samplers.instance_balanced_pos_sampler import balanced_choice
from mmdet_lt.models.task_modules.samplers.ohem_sampler import row_losses
from mmdet_lt.registry import MODELS as OURS

C = 3
STATISTICS = ClassStatistics([f'c{i}' for i in range(C)], [40, 10, 2], [90, 30, 2], 60)
LOSSES = sorted(
    name
    for name, cls in OURS.module_dict.items()
    if isinstance(cls, type) and issubclass(cls, LongTailLoss)
)
STOCK = [
    dict(type='CrossEntropyLoss'),
    dict(type='CrossEntropyLoss', use_sigmoid=True),
    dict(type='SeesawLoss', num_classes=C),
    dict(type='mmdet_lt.SeesawLoss', return_dict=True),
]


def roi_head(loss, shared_bn=False):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    config = faster_rcnn(C)
    head = config['roi_head']
    head['bbox_head']['loss_cls'] = loss
    if shared_bn:
        head['bbox_head'].update(
            type='ConvFCBBoxHead',
            num_shared_convs=1,
            num_shared_fcs=1,
            conv_out_channels=16,
            norm_cfg=dict(type='BN'),
        )
    train = ConfigDict(config['train_cfg']['rcnn'])
    train.sampler = dict(
        type='mmdet_lt.OHEMSampler', num=8, pos_fraction=0.5, add_gt_as_proposals=False
    )
    model = MODELS.build(dict(head, train_cfg=train, test_cfg=config['test_cfg']['rcnn']))
    for module in model.modules():
        if hasattr(module, 'set_class_statistics'):
            module.set_class_statistics(STATISTICS)
    # Logits wide enough to tell rows apart.
    torch.nn.init.normal_(model.bbox_head.fc_cls.weight, std=0.5)
    return model.train()


def scene():
    """Features, 30 boxes; 10 of them positive, 15 negative, 5 ignored."""
    generator = torch.Generator().manual_seed(3)
    feats = [torch.randn(1, 16, 32 // k, 32 // k, generator=generator) for k in (4, 8)]
    corner = torch.rand(30, 2, generator=generator) * 30
    boxes = torch.cat([corner, corner + 8 + torch.rand(30, 2, generator=generator) * 20], 1)
    gt = torch.cat([torch.arange(10) % 3 + 1, torch.zeros(15), torch.full((5,), -1.0)]).long()
    labels = torch.where(gt > 0, gt - 1, torch.full_like(gt, -1))
    truth = InstanceData(bboxes=boxes[:3], labels=torch.arange(3))
    return feats, boxes, AssignResult(3, gt, torch.zeros(30), labels), truth


def sample(model):
    feats, boxes, assigned, truth = scene()
    predicted = InstanceData(priors=boxes)
    return model.bbox_sampler.sample(assigned, predicted, truth, feats=feats)


def state(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize('loss', [*LOSSES, *STOCK], ids=str)
def test_ohem_takes_every_loss_and_leaves_its_state(loss):
    config = dict(type=f'mmdet_lt.{loss}') if isinstance(loss, str) else loss
    model = roi_head(config)
    for module in model.modules():
        if isinstance(module, RunningStatistics):
            module.step_driven = True  # as under ClassStatisticsHook
    before = state(model)
    result = sample(model)
    assert len(result.pos_inds) == len(result.neg_inds) == 4
    assert (result.pos_inds < 10).all()
    assert ((result.neg_inds >= 10) & (result.neg_inds < 25)).all()
    after = state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('kind', ['CrossEntropyLoss', 'mmdet_lt.BCELoss', 'mmdet_lt.SeesawLoss'])
def test_ohem_chooses_the_hardest(kind):
    model = roi_head(dict(type=kind))
    result = sample(model)
    feats, boxes, assigned, _ = scene()
    rois = torch.cat([torch.zeros(30, 1), boxes], 1)
    with torch.no_grad():
        z = model._bbox_forward(feats, rois)['cls_score']
    label = torch.where(assigned.labels >= 0, assigned.labels, torch.tensor(C))
    if kind == 'CrossEntropyLoss':
        loss = -z.log_softmax(1).gather(1, label[:, None])[:, 0]
    elif kind == 'mmdet_lt.BCELoss':
        target = torch.eye(C + 1)[label][:, :C]
        loss = -(target * z.sigmoid().log() + (1 - target) * (1 - z.sigmoid()).log()).sum(1)
    else:
        objectness = -z[:, C:].log_softmax(1).gather(1, (label == C).long()[:, None])[:, 0]
        loss = objectness + model.bbox_head.loss_cls(z, label, reduction_override='none')
        loss -= objectness  # the loss of a row is both parts
    assert result.pos_inds.tolist() == sorted(loss[:10].topk(4).indices.tolist())
    assert result.neg_inds.tolist() == sorted((loss[10:25].topk(4).indices + 10).tolist())


def test_ohem_leaves_batch_norm_of_the_head():
    model = roi_head(dict(type='CrossEntropyLoss'), shared_bn=True)
    mean = model.bbox_head.shared_convs[0].bn.running_mean
    before = mean.clone()
    sample(model)
    assert torch.equal(mean, before) and model.bbox_head.training
    feats, boxes, *_ = scene()
    model._bbox_forward(feats, torch.cat([torch.zeros(30, 1), boxes], 1))
    assert not torch.equal(mean, before)  # the test would see it


def test_stock_ohem_moves_the_counts_that_ours_leaves():
    model = roi_head(dict(type='SeesawLoss', num_classes=C))
    feats, boxes, assigned, _ = scene()
    model.bbox_head.loss_cls(torch.zeros(2, C + 2), torch.tensor([0, C]), reduction_override='none')
    assert model.bbox_head.loss_cls.cum_samples.sum() == 2


def test_rows_of_losses():
    parts = dict(
        loss_cls_classes=torch.tensor([[1.0, 2.0], [0.0, 5.0]]),
        loss_cls_objectness=torch.tensor([0.5, 0.25]),
        acc=torch.tensor([9.0, 9.0]),
    )
    assert row_losses(parts, 'loss_cls', 2).tolist() == [3.5, 5.25]
    # Heads that store a whole dict, and a term that is one number for all rows.
    nested = dict(loss_cls=dict(parts, loss_cls_rest=torch.tensor(7.0)))
    assert row_losses(nested, 'loss_cls', 2).tolist() == [3.5, 5.25]
    with pytest.raises(InputError, match='one loss per row.*RandomSampler'):
        row_losses(dict(loss_cls=torch.tensor(1.0)), 'loss_cls', 2)
    with pytest.raises(InputError, match=r'\(3,\).* 2 rows'):
        row_losses(dict(loss_cls=torch.ones(3)), 'loss_cls', 2)
    with pytest.raises(InputError, match=r"no loss named loss_cls\* in \['acc'\]"):
        row_losses(dict(acc=torch.ones(2)), 'loss_cls', 2)


def test_ohem_refuses_a_loss_without_rows_and_other_places():
    with pytest.raises(InputError, match='one loss per row'):
        sample(roi_head(dict(type='EQLV2Loss', num_classes=C)))
    config = dict(type='mmdet_lt.OHEMSampler', num=8, pos_fraction=0.5)
    with pytest.raises(InputError, match=r'train_cfg\.rcnn\.sampler'):
        TASK_UTILS.build(config, default_args=dict(context=object()))


@pytest.mark.parametrize('semantic', [False, True])
def test_ohem_in_every_stage_of_a_cascade(semantic):
    """HTC adds features of its semantic branch to those of the boxes, for the ranking as well."""
    model = MODELS.build(htc(semantic))
    prepare_model(model, FIVE)
    model.init_weights()
    samplers = model.roi_head.bbox_sampler
    assert [s.bbox_head for s in samplers] == list(model.roi_head.bbox_head)
    ranked = []
    original = model.roi_head._bbox_forward

    def watch(stage, x, rois, semantic_feat=None):
        if not torch.is_grad_enabled():
            ranked.append((stage, semantic_feat))
        elif semantic:  # of the whole batch, one image here
            used = [feat for of, feat in ranked if of == stage]
            assert all(torch.equal(feat, semantic_feat) for feat in used)
        return original(stage, x, rois, semantic_feat=semantic_feat)

    model.roi_head._bbox_forward = watch
    images, samples = batch(masks=True)
    samples[0].gt_sem_seg = PixelData(sem_seg=torch.zeros(1, 64, 64))
    losses, _ = model.parse_losses(model.train().loss(images, samples))
    assert torch.isfinite(losses) and {stage for stage, _ in ranked} == {0, 1, 2}
    assert all((feat is not None) == semantic for _, feat in ranked)


def htc(semantic):
    init_default_scope('mmdet')
    config = tiny_config('HTC', dict(type='mmdet_lt.EQLv2Loss', use_sigmoid=True), False)
    for stage in config.train_cfg.rcnn:
        stage.sampler = dict(type='mmdet_lt.OHEMSampler', num=6, pos_fraction=0.3)
    if semantic:
        config.roi_head.semantic_roi_extractor = dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),
            out_channels=16,
            featmap_strides=[8],
        )
        config.roi_head.semantic_head = dict(
            type='FusedSemanticHead',
            num_ins=5,
            fusion_level=1,
            seg_scale_factor=1 / 8,
            num_convs=1,
            in_channels=16,
            conv_out_channels=16,
            num_classes=3,
        )
    return config


# ---- instance-balanced positives ---------------------------------------------------------------


def assignment(counts, ignored=7):
    """``counts[k]`` candidates of box k in random order, among negatives."""
    gt = np.repeat(np.arange(len(counts) + 1), [ignored, *counts])
    gt = torch.from_numpy(np.random.default_rng(0).permutation(gt))
    return AssignResult(len(counts), gt, torch.zeros(len(gt)), torch.zeros(len(gt)).long())


def test_stock_sampler_repeats_itself():
    """Its fill-up takes indices again that were drawn before."""
    torch.manual_seed(0)
    stock = StockSampler(num=64, pos_fraction=0.5)
    drawn = stock._sample_pos(assignment([40, 1, 1, 1]), 32)
    assert len(drawn.unique()) < len(drawn) == 32


@pytest.mark.parametrize('counts', [[40, 1, 1, 1], [10, 10, 10], [3, 50], [40]])
def test_positives_are_spread_and_none_comes_twice(counts):
    torch.manual_seed(0)
    sampler = TASK_UTILS.build(
        dict(type='mmdet_lt.InstanceBalancedPosSampler', num=32, pos_fraction=0.5)
    )
    assigned = assignment(counts)
    drawn = sampler._sample_pos(assigned, 16)
    assert len(drawn) == len(drawn.unique()) == 16
    found = torch.bincount(assigned.gt_inds[drawn], minlength=len(counts) + 1)
    assert found[0] == 0
    # Water filling by hand: one for each box in turn until 16 are given out.
    expected, left = [0] * len(counts), 16
    while left >= sum(e < c for e, c in zip(expected, counts, strict=True)) > 0:
        for k, count in enumerate(counts):
            if expected[k] < count:
                expected[k], left = expected[k] + 1, left - 1
    surplus = found[1:] - torch.tensor(expected)
    assert surplus.sum() == left and set(surplus.tolist()) <= {0, 1}


def test_few_positives_are_all_taken():
    sampler = TASK_UTILS.build(
        dict(type='mmdet_lt.InstanceBalancedPosSampler', num=32, pos_fraction=0.5)
    )
    assigned = assignment([3, 2])
    assert set(sampler._sample_pos(assigned, 16).tolist()) == set(
        torch.nonzero(assigned.gt_inds > 0).flatten().tolist()
    )
    assert len(sampler._sample_pos(assignment([0]), 16)) == 0


def test_every_candidate_is_as_likely_as_its_siblings():
    torch.manual_seed(0)
    group = torch.tensor([1] * 4 + [2] * 2)
    hits = torch.zeros(6)
    for _ in range(4000):
        hits[balanced_choice(group, 3)] += 1
    share = hits / 4000
    # Each box gives one; the third goes to either box with even odds.
    expected = torch.tensor([1.5 / 4] * 4 + [1.5 / 2] * 2)
    assert (share - expected).abs().max() < 0.03  # four standard deviations
