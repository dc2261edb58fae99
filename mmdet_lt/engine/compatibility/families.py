"""Tiny versions of MMDetection's own configs, one for each family of detectors.

They keep the heads, assigners and coders of the stock config; widths, layers and proposals shrink
so that a cell of the matrix takes a fraction of a second. At test nothing is suppressed or cut off:
every score of every row comes out and can be compared.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import ConfigDict

#: Classes, and pixels of a side of the image, of the tiny models.
C, SIZE = 5, 64
#: Queries of DETRs and proposals of Sparse R-CNN.
QUERIES = 12
_ALL = 100_000
_WIDTHS = {2048: 32, 1024: 32, 512: 16, 256: 16, 128: 8}


@dataclass(frozen=True)
class Family:
    """One family of detectors.

    Attributes:
        config: Stock config of MMDetection.
        heads: Paths of the modules that hold a classification loss.
        layers: Names of the classifier layers, as endings of module names.
        rule: How the scores at test follow from the classifier, see ``scores.py``.
        adapters: Place in the config to class of this package, for losses that stock heads refuse.
        factor: Layers of what multiplies the scores.
        shrink: Further changes of the config.
        needs: Module that must be importable, and the name of its distribution.
    """

    config: str
    heads: tuple[str, ...]
    layers: tuple[str, ...]
    rule: str
    adapters: dict[str, str] = field(default_factory=dict)
    factor: tuple[str, ...] = ()
    shrink: Callable[[ConfigDict], None] | None = None
    needs: tuple[str, str] | None = None


def tiny_config(name: str, loss: dict[str, Any], adapted: bool) -> ConfigDict:
    """Config of a family with ``loss`` in all its heads, with the adapters or without."""
    family, model = FAMILIES[name], copy.deepcopy(_shrunk(name))
    for path in family.heads:
        for head in _at(model, path):
            head.loss_cls = ConfigDict(copy.deepcopy(loss))
    if family.rule == 'mask2former':
        _for_mask2former(model, bool(loss['use_sigmoid']))
    if family.rule == 'detr':
        per_query = C if loss['use_sigmoid'] else 1
        model.test_cfg = ConfigDict(max_per_img=QUERIES * per_query)
    if adapted:
        for path, name in family.adapters.items():
            for part in _at(model, path):
                part.type = f'mmdet_lt.{name}'
        if family.adapters.get('bbox_head') == 'LTTOODHead' and not loss['use_sigmoid']:
            model.bbox_head.initial_loss_cls = None
    return model


@functools.cache
def _shrunk(name: str) -> ConfigDict:
    """The stock config of a family on tiny settings."""
    from mmengine.hub import get_config

    family = FAMILIES[name]
    model = get_config(f'mmdet::{family.config}').model
    # DETRs have positional encodings of 2 x 128 numbers in their code.
    width = 256 if family.rule == 'detr' else 16
    _body(model)
    _narrow(model, width)
    _test_settings(model)
    if family.shrink is not None:
        family.shrink(model)
    return model


def _at(config: Any, path: str) -> list[Any]:
    """The parts at a dotted path; a list stands for all its items."""
    parts = [config]
    for key in path.split('.'):
        parts = [part[key] for part in parts]
        parts = [item for part in parts for item in (part if isinstance(part, list) else [part])]
    return parts


def _body(model: ConfigDict) -> None:
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


def _narrow(config: Any, width: int) -> None:
    """Fewer channels, classes, heads and groups everywhere; 256 channels become ``width``."""
    if isinstance(config, (list, tuple)):
        for item in config:
            _narrow(item, width)
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
            _narrow(value, width)
        elif name in few:
            config[name] = few[name]
        elif name == 'feedforward_channels':
            config[name] = 32
        elif width < 256 and value in _WIDTHS:
            if 'channel' in name or 'dims' in name or name == 'num_feats':
                config[name] = _WIDTHS[value]


def _test_settings(model: ConfigDict) -> None:
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


def _groups(model: ConfigDict) -> None:
    model.bbox_head.norm_cfg = ConfigDict(type='GN', num_groups=4, requires_grad=True)


def _detr(model: ConfigDict) -> None:
    model.num_queries = QUERIES
    model.encoder.num_layers, model.decoder.num_layers = 1, 2
    if 'dn_cfg' in model:
        model.dn_cfg.group_cfg.num_dn_queries = 6
    if 'dqs_cfg' in model:
        model.dqs_cfg.iou_threshold = 1.0


def _sparse(model: ConfigDict) -> None:
    model.rpn_head.num_proposals = QUERIES
    model.test_cfg.rcnn = ConfigDict(max_per_img=QUERIES * C)
    for head in model.roi_head.bbox_head:
        head.dynamic_conv_cfg.feat_channels = 8
        head.num_reg_fcs = 1


def _double(model: ConfigDict) -> None:
    model.roi_head.bbox_head.num_convs = 1


def _mask2former(model: ConfigDict) -> None:
    head = model.panoptic_head
    head.num_things_classes, head.num_stuff_classes, head.num_queries = C, 0, QUERIES
    head.pixel_decoder.encoder.num_layers = 1
    head.transformer_decoder.num_layers = 2
    model.panoptic_fusion_head.update(num_things_classes=C, num_stuff_classes=0)
    model.train_cfg.num_points = 64
    model.test_cfg = ConfigDict(panoptic_on=False, instance_on=True, max_per_image=QUERIES * C)


def _for_mask2former(model: ConfigDict, sigmoid: bool) -> None:
    model.panoptic_head.loss_cls.class_weight = [1.0] * C + [0.1]
    if sigmoid:
        for cost in model.train_cfg.assigner.match_costs:
            if cost.type == 'ClassificationCost':
                cost.type = 'FocalLossCost'


def _tood(model: ConfigDict) -> None:
    _groups(model)
    model.train_cfg.initial_epoch = 0


def _paa(model: ConfigDict) -> None:
    _groups(model)
    model.bbox_head.score_voting = False


def _one_stage(config: str, layer: str, **kwargs: Any) -> Family:
    rule = kwargs.pop('rule', 'dense')
    return Family(config, ('bbox_head',), (layer,), rule, **kwargs)


def _two_stage(config: str, **kwargs: Any) -> Family:
    return Family(config, ('roi_head.bbox_head',), ('fc_cls',), kwargs.pop('rule', 'roi'), **kwargs)


def _detr_family(config: str, layer: str, adapter: str) -> Family:
    return Family(config, ('bbox_head',), (layer,), 'detr', {'bbox_head': adapter}, shrink=_detr)


FAMILIES: dict[str, Family] = {
    'Faster R-CNN': _two_stage('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    'Mask R-CNN': _two_stage('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
    'Cascade R-CNN': _two_stage('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'),
    'HTC': _two_stage('htc/htc-without-semantic_r50_fpn_1x_coco.py'),
    'Double-Head': _two_stage(
        'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
        adapters={'roi_head.bbox_head': 'LTDoubleConvFCBBoxHead'},
        shrink=_double,
    ),
    'SABL': _two_stage(
        'sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py',
        adapters={'roi_head.bbox_head': 'LTSABLHead'},
        rule='sabl',
    ),
    'Sparse R-CNN': _two_stage(
        'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
        adapters={'roi_head': 'LTSparseRoIHead', 'roi_head.bbox_head': 'LTDIIHead'},
        shrink=_sparse,
        rule='sparse',
    ),
    'RetinaNet': _one_stage('retinanet/retinanet_r50_fpn_1x_coco.py', 'retina_cls'),
    'ATSS': _one_stage(
        'atss/atss_r50_fpn_1x_coco.py', 'atss_cls', factor=('atss_centerness',), shrink=_groups
    ),
    'FCOS': _one_stage(
        'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        'conv_cls',
        factor=('conv_centerness',),
        shrink=_groups,
    ),
    'PAA': _one_stage(
        'paa/paa_r50_fpn_1x_coco.py',
        'atss_cls',
        factor=('atss_centerness',),
        adapters={'bbox_head': 'LTPAAHead'},
        shrink=_paa,
        rule='paa',
        needs=('sklearn.mixture', 'scikit-learn'),
    ),
    'GFL': _one_stage(
        'gfl/gfl_r50_fpn_1x_coco.py',
        'gfl_cls',
        adapters={'bbox_head': 'LTGFLHead'},
        shrink=_groups,
    ),
    'VFNet': _one_stage(
        'vfnet/vfnet_r50_fpn_1x_coco.py',
        'vfnet_cls',
        adapters={'bbox_head': 'LTVFNetHead'},
        shrink=_groups,
    ),
    'TOOD': _one_stage(
        'tood/tood_r50_fpn_1x_coco.py',
        'tood_cls',
        factor=('cls_prob_module',),
        adapters={'bbox_head': 'LTTOODHead'},
        shrink=_tood,
        rule='tood',
    ),
    'RTMDet': _one_stage(
        'rtmdet/rtmdet_l_8xb32-300e_coco.py',
        'rtm_cls',
        adapters={'bbox_head': 'LTRTMDetSepBNHead'},
    ),
    'YOLOX': _one_stage(
        'yolox/yolox_s_8xb8-300e_coco.py',
        'multi_level_conv_cls',
        factor=('multi_level_conv_obj',),
        adapters={'bbox_head': 'LTYOLOXHead'},
        rule='yolox',
    ),
    'YOLOF': _one_stage(
        'yolof/yolof_r50-c5_8xb8-1x_coco.py',
        'cls_score',
        factor=('object_pred',),
        adapters={'bbox_head': 'LTYOLOFHead'},
        rule='yolof',
    ),
    'Conditional DETR': _detr_family(
        'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py', 'fc_cls', 'LTConditionalDETRHead'
    ),
    'Deformable DETR': _detr_family(
        'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        'cls_branches.0',
        'LTDeformableDETRHead',
    ),
    'Deformable DETR, two-stage': _detr_family(
        'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
        'cls_branches.1',
        'LTDeformableDETRHead',
    ),
    'DINO': _detr_family('dino/dino-4scale_r50_8xb2-12e_coco.py', 'cls_branches.1', 'LTDINOHead'),
    'DDQ': _detr_family(
        'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', 'cls_branches.1', 'LTDDQDETRHead'
    ),
    'Mask2Former': Family(
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        ('panoptic_head',),
        ('cls_embed',),
        'mask2former',
        {
            'panoptic_head': 'LTMask2FormerHead',
            'panoptic_fusion_head': 'LTMaskFormerFusionHead',
        },
        shrink=_mask2former,
    ),
}
