"""Activation maps against slow, direct computations."""

from __future__ import annotations

import pytest
import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from torch import nn
from toy_models import MODELS

from mmdet_lt.cam import gradcam
from mmdet_lt.errors import InputError

CLASSES = 3


def build(config):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = DETECTORS.build(ConfigDict(config))
    model.init_weights()
    for module in model.modules():  # initial heads are nearly zero: make the maps large
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.1)
    return model.requires_grad_(False).eval()


def inputs(count=6):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * 30
    size = 8 + torch.rand(count, 2, generator=generator) * 25
    image = torch.arange(count) % 2
    rois = torch.cat([image[:, None].float(), corner, corner + size], 1)
    return images, rois, torch.randint(0, CLASSES, (count,), generator=generator)


def direct(extractor, head, features, roi, label, method):
    """One box at a time, channel by channel, straight from the definition."""
    cut = extractor(features[: extractor.num_inputs], roi[None]).requires_grad_()
    head(cut)[0][0, label].backward()
    cam = torch.zeros(cut.shape[2:])
    for k in range(cut.shape[1]):
        gradient = cut.grad[0, k]
        cam += cut.detach()[0, k] * (gradient.mean() if method == 'gradcam' else gradient)
    return cam.clamp(min=0)


@pytest.mark.parametrize('method', gradcam.METHODS)
def test_roi_maps(method, monkeypatch):
    model = build(MODELS['faster_rcnn'](CLASSES))
    images, rois, labels = inputs()
    features = model.extract_feat(images)
    kind, compute = gradcam.box_cams(model, method)
    maps = compute(images, rois, labels)
    assert kind == 'roi' and maps.shape == (6, 5, 5) and maps.dtype == torch.float32
    assert not maps.requires_grad and maps.max() > 0
    part = model.roi_head
    for k in range(6):
        expected = direct(
            part.bbox_roi_extractor, part.bbox_head, features, rois[k], labels[k], method
        )
        torch.testing.assert_close(maps[k], expected, rtol=1e-4, atol=1e-6)
    # The same in small portions, and the two methods do differ.
    monkeypatch.setattr(gradcam, 'MAX_ROIS', 4)
    torch.testing.assert_close(compute(images, rois, labels), maps, rtol=1e-4, atol=1e-6)
    other = gradcam.box_cams(model, {'gradcam': 'hirescam', 'hirescam': 'gradcam'}[method])[1]
    assert not torch.allclose(other(images, rois, labels), maps, rtol=1e-2)


def test_cascade_uses_the_last_stage():
    config = MODELS['faster_rcnn'](CLASSES)
    config['type'] = 'CascadeRCNN'
    head = config['roi_head']
    stages = [head['bbox_head'], head['bbox_head'], dict(head['bbox_head'], fc_out_channels=24)]
    config['roi_head'] = dict(
        head,
        type='CascadeRoIHead',
        num_stages=3,
        stage_loss_weights=[1, 1, 1],
        bbox_head=stages,
    )
    rcnn = config['train_cfg']['rcnn']
    config['train_cfg'] = dict(config['train_cfg'], rcnn=[rcnn] * 3)
    model = build(config)
    images, rois, labels = inputs()
    features = model.extract_feat(images)
    maps = gradcam.box_cams(model)[1](images, rois, labels)
    part = model.roi_head
    expected = direct(
        part.bbox_roi_extractor[2], part.bbox_head[2], features, rois[3], labels[3], 'gradcam'
    )
    torch.testing.assert_close(maps[3], expected, rtol=1e-4, atol=1e-6)


def fcos(num_classes):
    config = MODELS['retinanet'](num_classes)
    config.update(type='FCOS', train_cfg=None)
    config['bbox_head'] = dict(
        type='FCOSHead',
        num_classes=num_classes,
        in_channels=16,
        stacked_convs=1,
        feat_channels=16,
        strides=[8, 16],
        regress_ranges=((-1, 32), (32, 1e8)),
        norm_cfg=None,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        loss_bbox=dict(type='IoULoss'),
    )
    return config


@pytest.mark.parametrize(
    ('config', 'last'), [(MODELS['retinanet'], 'retina_cls'), (fcos, 'conv_cls')]
)
def test_dense_gradient_is_that_of_autograd(config, last):
    """Away from the border the closed form equals the gradient of the summed logits."""
    model = build(config(CLASSES))
    images, _, _ = inputs()
    features = model.extract_feat(images)
    branches = gradcam._class_branches(model.bbox_head, features)
    conv = getattr(model.bbox_head, last)
    assert len(branches) == 2
    for feature, weight in branches:
        assert weight.shape == (CLASSES, 16)
        for label in range(CLASSES):
            leaf = feature.detach().requires_grad_()
            logits = conv(leaf)
            anchors = logits.shape[1] // CLASSES
            logits.view(2, anchors, CLASSES, *logits.shape[2:])[:, :, label].sum().backward()
            inside = leaf.grad[:, :, 1:-1, 1:-1]
            expected = weight[label][None, :, None, None].expand_as(inside)
            torch.testing.assert_close(inside, expected, rtol=1e-4, atol=1e-5)


def test_dense_maps_look_at_the_right_place():
    """Cells aligned with pixels of the level: the map is the level's own, cut at the box."""
    model = build(MODELS['retinanet'](CLASSES))
    images, _, _ = inputs()
    features = model.extract_feat(images)
    feature, weight = gradcam._class_branches(model.bbox_head, features)[0]
    # Seven cells of stride 8, so the box is 56 pixels; RoIAlign's 2 x 2 samples a cell average out
    # to the cell itself only on a linear map, so make the features one.
    ramp = torch.linspace(0, 7, 8).expand(1, 16, 8, 8)
    values = torch.relu((weight[1][:, None, None] * ramp[0]).sum(0))
    rois = torch.tensor([[0.0, 4.0, 4.0, 60.0, 60.0]])
    cut = gradcam.roi_align(ramp.contiguous(), rois, (7, 7), 1 / 8, 2, 'avg', True)
    found = torch.relu(torch.einsum('nkhw,nk->nhw', cut, weight[[1]]))[0]
    # Cell j of the map lies between cells j and j + 1 of the level.
    torch.testing.assert_close(found, (values[:7, :7] + values[:7, 1:]) / 2, rtol=1e-4, atol=1e-4)
    kind, compute = gradcam.box_cams(model)
    maps = compute(images, rois, torch.tensor([1]))
    assert kind == 'dense' and maps.shape == (1, 7, 7) and (maps >= 0).all()


def test_levels():
    """Nearest on a logarithmic scale: 11 is nearer to 8 than to 16, 12 is not."""
    boxes = torch.tensor([[0, 0, 11, 11], [0, 0, 12, 12], [0, 0, 4, 36], [0, 0, 500, 500]]).float()
    assert gradcam.assign_levels(boxes, [[8.0], [16.0]]).tolist() == [0, 1, 1, 1]
    assert gradcam.assign_levels(boxes, [[8.0, 12.0], [16.0]]).tolist() == [0, 0, 0, 1]


def test_level_sides_follow_the_anchors():
    head = build(MODELS['retinanet'](CLASSES)).bbox_head
    sides = gradcam.level_sides(head, [8, 16])
    assert [round(side, 3) for side in sides[0]] == [16, 16, 16]
    assert [round(side, 3) for side in sides[1]] == [32, 32, 32]
    assert gradcam.level_sides(nn.Identity(), [8, 16]) == [[64], [128]]


class OddHead(nn.Module):
    cls_out_channels = CLASSES

    def forward(self, features):
        return ([feature.mean(1, keepdim=True) for feature in features],)


class OddRoIHead(nn.Module):
    def _bbox_forward(self, stage, x, rois, object_feats):
        raise AssertionError


@pytest.mark.parametrize(
    ('parts', 'sentence'),
    [
        ({}, 'neither `roi_head` nor `bbox_head`'),
        ({'bbox_head': OddHead()}, 'OddHead do not come straight from a convolution'),
        ({'roi_head': OddRoIHead()}, 'OddRoIHead scores boxes from .*object_feats'),
    ],
)
def test_detectors_without_maps(parts, sentence):
    model = nn.Module()
    model.extract_feat = lambda images: (images,)
    for name, part in parts.items():
        setattr(model, name, part)
    images, rois, labels = inputs()
    with pytest.raises(InputError, match=sentence):
        gradcam.box_cams(model)[1](images, rois, labels)


def test_unknown_method():
    with pytest.raises(InputError, match="'gradcam', 'hirescam'.*'layercam'"):
        gradcam.box_cams(nn.Module(), 'layercam')
