"""Small widths, few layers and all scores at test for MMDetection's own configs."""

from __future__ import annotations

from typing import Any

from mmengine.config import ConfigDict

#: Classes, and pixels of a side of the image, of the tiny models.
C, SIZE = 5, 64
#: Queries of DETRs and proposals of Sparse R-CNN.
QUERIES = 12
_ALL = 100_000
_WIDTHS = {2048: 32, 1024: 32, 512: 16, 256: 16, 128: 8}


def body(model: ConfigDict) -> None:
    """ResNet-18 with 8 base channels; the neck keeps its kind unless it is one of a CSP network."""
    out = model.backbone.get('out_indices', (0, 1, 2, 3))
    channels = [8, 16, 32, 64]
    csp = model.backbone.type.startswith('CSP')
    if csp:
        out = (1, 2, 3)
    model.backbone = ConfigDict(
        type='ResNet', depth=18, base_channels=8, norm_eval=True, out_indices=tuple(out)
    )
    used = [channels[i] for i in out]
    if csp:
        model.neck = ConfigDict(type='FPN', in_channels=used, out_channels=16, num_outs=3)
        model.bbox_head.update(in_channels=16, feat_channels=16)
    elif 'neck' in model:
        for neck in model.neck if isinstance(model.neck, list) else [model.neck]:
            neck.in_channels = used[-1] if isinstance(neck.in_channels, int) else used
    if 'panoptic_head' in model:
        model.panoptic_head.in_channels = used


def narrow(config: Any, width: int) -> None:
    """Fewer channels, classes, heads and groups everywhere; 256 channels become ``width``."""
    if isinstance(config, (list, tuple)):
        for item in config:
            narrow(item, width)
    if not isinstance(config, dict):
        return
    if config.get('type') == 'SyncBN':
        config['type'] = 'BN'
    few = dict(num_classes=C, num_groups=4)
    if width < 256:
        few.update(num_heads=2)
    for name, value in list(config.items()):
        if name == 'backbone':
            continue
        if isinstance(value, (dict, list, tuple)):
            narrow(value, width)
        elif name in few:
            config[name] = few[name]
        elif name == 'feedforward_channels':
            config[name] = 32
        elif width < 256 and value in _WIDTHS:
            if 'channel' in name or 'dims' in name or name == 'num_feats':
                config[name] = _WIDTHS[value]


def test_settings(model: ConfigDict) -> None:
    """All scores come out of the test; few proposals go in."""
    few = dict(nms_pre=60, max_per_img=30)
    train = model.get('train_cfg') or {}
    if 'rpn_proposal' in train:
        train.rpn_proposal.update(few)
        for stage in train.rcnn if isinstance(train.rcnn, list) else [train.rcnn]:
            stage.sampler.num = 32
    test = model.get('test_cfg') or {}
    if 'rpn' in test and test.rpn is not None:
        test.rpn.update(few)
    last = test.get('rcnn', test)
    last.update(score_thr=0.0, min_bbox_size=-1, nms_pre=_ALL, max_per_img=_ALL)
    if 'nms' in last:
        last.nms = ConfigDict(type='nms', iou_threshold=1.0)


def groups(model: ConfigDict) -> None:
    """Group norms of the head that divide its few channels."""
    model.bbox_head.norm_cfg = ConfigDict(type='GN', num_groups=4, requires_grad=True)


def detr(model: ConfigDict) -> None:
    """Few queries, one encoder layer, two decoder layers."""
    model.num_queries = QUERIES
    model.encoder.num_layers, model.decoder.num_layers = 1, 2
    if 'dn_cfg' in model:
        model.dn_cfg.group_cfg.num_dn_queries = 6
    if 'dqs_cfg' in model:
        model.dqs_cfg.iou_threshold = 1.0


def sparse(model: ConfigDict) -> None:
    """Few proposals, and a score of every class of each."""
    model.rpn_head.num_proposals = QUERIES
    model.test_cfg.rcnn = ConfigDict(max_per_img=QUERIES * C)
    for head in model.roi_head.bbox_head:
        head.dynamic_conv_cfg.feat_channels = 8
        head.num_reg_fcs = 1


def double(model: ConfigDict) -> None:
    """One convolution."""
    model.roi_head.bbox_head.num_convs = 1


def mask2former(model: ConfigDict) -> None:
    """Few queries and layers, instances only."""
    head = model.panoptic_head
    head.num_things_classes, head.num_stuff_classes, head.num_queries = C, 0, QUERIES
    head.pixel_decoder.encoder.num_layers = 1
    head.transformer_decoder.num_layers = 2
    model.panoptic_fusion_head.update(num_things_classes=C, num_stuff_classes=0)
    model.train_cfg.num_points = 64
    model.test_cfg = ConfigDict(panoptic_on=False, instance_on=True, max_per_image=QUERIES * C)


def tood(model: ConfigDict) -> None:
    """The quality loss from the first iteration."""
    groups(model)
    model.train_cfg.initial_epoch = 0


def paa(model: ConfigDict) -> None:
    """Scores as the classifier gives them, without voting."""
    groups(model)
    model.bbox_head.score_voting = False
