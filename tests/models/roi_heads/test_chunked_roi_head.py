"""The chunked RoI head equals MMDetection's, whatever the size of the chunks; AllSampler."""

import copy

import pytest
import torch
from mmdet.models.task_modules.assigners import AssignResult
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from sampling_free_toy import plain_model
from torch.utils import checkpoint as torch_checkpoint

from mmdet_lt import InputError
from mmdet_lt.models.losses.eqlv2_loss import EQLv2Loss
from mmdet_lt.models.roi_heads import chunked_roi_head

SIZE = 32


def roi_head(kind='mmdet_lt.ChunkedRoIHead', mask=True, **options):
    init_default_scope('mmdet')
    model = ConfigDict(copy.deepcopy(plain_model('FasterRCNN')))
    head = model.roi_head
    head.update(type=kind, train_cfg=model.train_cfg.rcnn, test_cfg=model.test_cfg.rcnn, **options)
    if mask:
        head.train_cfg.mask_size = 8
        head.mask_roi_extractor = copy.deepcopy(head.bbox_roi_extractor)
        head.mask_head = dict(
            type='FCNMaskHead',
            num_convs=1,
            in_channels=16,
            conv_out_channels=8,
            num_classes=3,
            roi_feat_size=4,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
        )
        head.mask_roi_extractor.roi_layer.output_size = 4
    torch.manual_seed(0)
    built = MODELS.build(head)
    built.init_weights()
    return built


def batch(objects=(2, 1)):
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(2, 16, SIZE // s, SIZE // s, generator=generator) for s in (8, 16)]
    proposals, samples = [], []
    for count in objects:
        boxes = torch.rand(40, 2, 2, generator=generator).sort(1)[0].flatten(1) * SIZE
        proposals.append(InstanceData(bboxes=boxes, scores=torch.ones(40)))
        sample = DetDataSample(
            metainfo=dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), scale_factor=(1, 1))
        )
        truth = InstanceData(bboxes=boxes[:count] + 1, labels=torch.arange(count))
        truth.masks = BitmapMasks(
            torch.ones(count, SIZE, SIZE, dtype=torch.uint8).numpy(), SIZE, SIZE
        )
        sample.gt_instances = truth
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return features, proposals, samples


def losses_and_gradients(head, objects=(2, 1)):
    features, proposals, samples = batch(objects)
    for level in features:
        level.requires_grad_()
    losses = head.loss(tuple(features), proposals, samples)
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    gradients = {k: p.grad for k, p in head.named_parameters()}
    gradients.update({str(i): level.grad for i, level in enumerate(features)})
    return losses, gradients


@pytest.mark.parametrize('objects', [(2, 1), (0, 0)], ids=['objects', 'no-object'])
@pytest.mark.parametrize('chunk_size', [1, 7, 41, 1000])
def test_losses_and_gradients_equal_the_stock_head(chunk_size, objects):
    if chunk_size == 1 and not sum(objects):
        pytest.skip('one slow case is enough')
    expected, wanted = losses_and_gradients(roi_head('StandardRoIHead'), objects)
    losses, gradients = losses_and_gradients(roi_head(chunk_size=chunk_size), objects)
    assert set(losses) == set(expected) >= {'loss_cls', 'loss_bbox', 'loss_mask'}
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-5, atol=1e-6)
    for key, value in wanted.items():
        torch.testing.assert_close(gradients[key], value, rtol=1e-4, atol=1e-5)


def test_predictions_equal_and_nothing_is_checkpointed_at_test(monkeypatch):
    features, proposals, samples = batch()
    expected = roi_head('StandardRoIHead').eval()
    head = roi_head(chunk_size=7).eval()
    monkeypatch.setattr(chunked_roi_head, 'checkpoint', None)
    with torch.no_grad():
        for owner in (expected, head):
            owner.test_cfg.mask_thr_binary = 0.5
        wanted = expected.predict(features, copy.deepcopy(proposals), samples)
        found = head.predict(features, proposals, samples)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.scores, b.scores)
        assert len(a) and torch.equal(a.labels, b.labels) and torch.equal(a.masks, b.masks)


def test_no_proposal_at_all():
    head = roi_head(mask=False)
    features, _, samples = batch((0, 0))
    empty = [InstanceData(bboxes=torch.zeros(0, 4)) for _ in samples]
    losses = head.loss(tuple(features), empty, samples)
    assert losses['loss_bbox'] == 0 and 'loss_cls' not in losses


def test_activations_of_one_chunk_at_a_time():
    """Tensors kept for the backward pass: a chunk's, not all rows'."""
    kept = []

    def bytes_kept(head):
        kept.clear()
        features, proposals, samples = batch()
        saving = torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.append(t.numel()), t)[1], lambda t: t
        )
        for level in features:
            level.requires_grad_()
        with saving:
            head.loss(tuple(features), proposals, samples)
        return sum(kept)

    stock = bytes_kept(roi_head('StandardRoIHead', mask=False))
    assert bytes_kept(roi_head(mask=False, chunk_size=10)) < stock / 4
    assert torch_checkpoint.checkpoint is chunked_roi_head.checkpoint


def test_running_statistics_count_each_row_once():
    state = []
    for kind, options in (('StandardRoIHead', {}), ('mmdet_lt.ChunkedRoIHead', {'chunk_size': 5})):
        head = roi_head(kind, mask=False, **options)
        torch.manual_seed(3)
        head.bbox_head.loss_cls = EQLv2Loss(use_sigmoid=True)
        head.bbox_head.loss_cls.get_cls_channels(3)
        head.train()
        losses_and_gradients(head)
        state.append(head.bbox_head.loss_cls.state_dict())
    assert state[0]['pos_grad'].sum() > 0
    for key, value in state[0].items():
        torch.testing.assert_close(state[1][key], value, rtol=1e-4, atol=1e-6)


def test_bad_options_are_refused():
    for size in (0, 2.5, True):
        with pytest.raises(InputError, match=r'chunk_size.*at least 1, found'):
            roi_head(chunk_size=size)
    head = roi_head(mask=False)
    head.bbox_head.norm = torch.nn.BatchNorm2d(3)
    features, proposals, samples = batch()
    with pytest.raises(InputError, match=r'`model\.roi_head\.bbox_head\.norm` trains batch norm'):
        head.loss(tuple(features), proposals, samples)
    head.bbox_head.norm.eval()
    head.loss(tuple(features), batch()[1], samples)


def test_a_shared_extractor_is_refused():
    init_default_scope('mmdet')
    model = ConfigDict(copy.deepcopy(plain_model('FasterRCNN')))
    model.roi_head.update(type='mmdet_lt.ChunkedRoIHead', test_cfg=model.test_cfg.rcnn)
    model.roi_head.mask_head = dict(type='FCNMaskHead', num_classes=3, in_channels=16)
    with pytest.raises(InputError, match='mask_roi_extractor'):
        MODELS.build(model.roi_head)


def test_all_sampler_keeps_everything_and_adds_the_truth():
    init_default_scope('mmdet')
    sampler = TASK_UTILS.build(dict(type='mmdet_lt.AllSampler'), default_args=dict(context=None))
    assigned = torch.tensor([0, 2, -1, 0, 1, 0])
    result = AssignResult(2, assigned, torch.zeros(6), labels=torch.tensor([-1, 7, -1, -1, 5, -1]))
    boxes = torch.arange(24.0).view(6, 4)
    truth = InstanceData(bboxes=torch.full((2, 4), 99.0), labels=torch.tensor([5, 7]))
    found = sampler.sample(result, InstanceData(priors=boxes), truth)
    assert found.pos_gt_labels.tolist() == [5, 7, 7, 5]  # the two boxes of the truth come first
    assert found.neg_inds.tolist() == [2, 5, 7] and found.avg_factor == 7
    empty = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    none = AssignResult(
        0, torch.zeros(6, dtype=torch.long), torch.zeros(6), labels=-assigned.new_ones(6)
    )
    found = sampler.sample(none, InstanceData(priors=boxes), empty)
    assert len(found.pos_inds) == 0 and len(found.neg_inds) == 6
