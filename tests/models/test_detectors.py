"""Both losses inside the detector families of MMDetection: width, training step, scores at test."""

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from mmdet_lt import ClassStatistics
from mmdet_lt.engine.hooks.class_counts import check_class_counts
from mmdet_lt.engine.hooks.class_statistics_hook import statistics_users

C = 4
BASES = {
    'faster': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mask': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'cascade': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'retinanet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'atss': 'atss/atss_r50_fpn_1x_coco.py',
    'fcos': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
}
DENSE = ('retinanet', 'atss', 'fcos')
STATISTICS = ClassStatistics([f'c{i}' for i in range(C)], [50, 20, 5, 1], [90, 30, 5, 1], 60)


def build(name, loss):
    init_default_scope('mmdet')
    cfg = get_config(f'mmdet::{BASES[name]}').model
    cfg.backbone = dict(type='ResNet', depth=18, base_channels=8, norm_eval=True)
    cfg.neck.in_channels = [8, 16, 32, 64]
    heads = [cfg.bbox_head] if name in DENSE else cfg.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.num_classes = C
        head.loss_cls = dict(type=f'mmdet_lt.{loss}', use_sigmoid=True)
    if name == 'mask':
        cfg.roi_head.mask_head.num_classes = C
    score = dict(score_thr=0.0, max_per_img=50)
    (cfg.test_cfg if name in DENSE else cfg.test_cfg.rcnn).update(score)
    model = MODELS.build(cfg)
    model.init_weights()
    check_class_counts(model, STATISTICS)
    users = [module for _, module in statistics_users(model)]
    for module in users:
        module.set_class_statistics(STATISTICS)
    assert len(users) == (3 if name == 'cascade' else 1)
    return model


def batch():
    torch.manual_seed(0)
    meta = dict(
        img_shape=(96, 96), ori_shape=(96, 96), batch_input_shape=(96, 96), pad_shape=(96, 96)
    )
    sample = DetDataSample(metainfo=dict(meta, scale_factor=(1.0, 1.0)))
    boxes = torch.tensor([[5.0, 5, 45, 50], [30, 40, 90, 90], [50, 10, 80, 40]])
    masks = torch.zeros(3, 96, 96, dtype=torch.uint8)
    for mask, box in zip(masks, boxes.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    sample.gt_instances = InstanceData(
        bboxes=boxes,
        labels=torch.tensor([0, 2, 3]),
        masks=BitmapMasks(masks.numpy(), 96, 96),
    )
    return torch.randn(1, 3, 96, 96), [sample]


@pytest.mark.parametrize('loss', ['EQLLoss', 'EQLv2Loss'])
@pytest.mark.parametrize('name', list(BASES))
def test_step_and_scores(name, loss):
    model = build(name, loss).train()
    images, samples = batch()
    total, _ = model.parse_losses(model.loss(images, samples))
    total.backward()
    heads = [model.bbox_head] if name in DENSE else model.roi_head.bbox_head
    heads = list(heads) if hasattr(heads, '__len__') else [heads]
    layer_name = {'retinanet': 'retina_cls', 'atss': 'atss_cls', 'fcos': 'conv_cls'}
    layers = [getattr(head, layer_name.get(name, 'fc_cls')) for head in heads]
    objectness = name not in DENSE and loss == 'EQLv2Loss'
    for layer, head in zip(layers, heads, strict=True):
        assert layer.weight.grad.abs().sum() > 0 and torch.isfinite(layer.weight.grad).all()
        if name not in DENSE:
            assert layer.out_features == C + objectness
        if loss == 'EQLv2Loss':
            assert (head.loss_cls.neg_grad > 0).all()
            assert (head.loss_cls.pos_grad[[0, 2, 3]] > 0).all()

    logits = []
    for layer in layers:
        layer.register_forward_hook(lambda m, i, out: logits.append(out.detach()))
    with torch.no_grad():
        found = model.eval().predict(images, samples)[0].pred_instances
    if name in DENSE:
        z = torch.cat([out.permute(0, 2, 3, 1).reshape(-1, C) for out in logits])
    else:
        z = torch.stack(logits).mean(0)  # a cascade averages the logits of its stages
    expected = z[:, :C].sigmoid()
    if objectness:
        expected = expected * (1 - z[:, C:].sigmoid())
    if name in ('atss', 'fcos'):
        # The centre score is multiplied afterwards: scores are at most the class probability.
        assert (found.scores <= expected.max() + 1e-6).all()
    else:
        for label, score in zip(found.labels, found.scores, strict=True):
            assert (expected[:, label] - score).abs().min() < 1e-6
    assert len(found) and found.labels.max() < C
