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

from mmdet_lt.engine.compatibility import tiny
from mmdet_lt.engine.compatibility.tiny import QUERIES, C


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
                head.loss_cls.class_weight = [1.0] * C + [0.1]
    if loss['use_sigmoid']:
        _match_by_sigmoid(model)
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
    tiny.body(model)
    tiny.narrow(model, width)
    tiny.test_settings(model)
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


def _match_by_sigmoid(model: ConfigDict) -> None:
    """What the message of a sigmoid loss below a matcher that takes a softmax says to do."""
    assigner = (model.get('train_cfg') or {}).get('assigner', {})
    for cost in assigner.get('match_costs', ()):
        if cost.type == 'ClassificationCost':
            cost.type = 'FocalLossCost'


def _one_stage(config: str, layer: str, **kwargs: Any) -> Family:
    rule = kwargs.pop('rule', 'dense')
    return Family(config, ('bbox_head',), (layer,), rule, **kwargs)


def _two_stage(config: str, **kwargs: Any) -> Family:
    return Family(config, ('roi_head.bbox_head',), ('fc_cls',), kwargs.pop('rule', 'roi'), **kwargs)


def _detr_family(config: str, layer: str, adapter: str) -> Family:
    return Family(
        config, ('bbox_head',), (layer,), 'detr', {'bbox_head': adapter}, shrink=tiny.detr
    )


FAMILIES: dict[str, Family] = {
    'Faster R-CNN': _two_stage('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    'Mask R-CNN': _two_stage('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
    'Cascade R-CNN': _two_stage('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'),
    'HTC': _two_stage('htc/htc-without-semantic_r50_fpn_1x_coco.py'),
    'Double-Head': _two_stage(
        'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
        adapters={'roi_head.bbox_head': 'LTDoubleConvFCBBoxHead'},
        shrink=tiny.double,
    ),
    'SABL': _two_stage(
        'sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py',
        adapters={'roi_head.bbox_head': 'LTSABLHead'},
        rule='sabl',
    ),
    'Sparse R-CNN': _two_stage(
        'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
        adapters={'roi_head': 'LTSparseRoIHead', 'roi_head.bbox_head': 'LTDIIHead'},
        shrink=tiny.sparse,
        rule='sparse',
    ),
    'PISA': _two_stage('pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py'),
    'Grid R-CNN': _two_stage('grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco.py'),
    'RetinaNet': _one_stage('retinanet/retinanet_r50_fpn_1x_coco.py', 'retina_cls'),
    'ATSS': _one_stage(
        'atss/atss_r50_fpn_1x_coco.py', 'atss_cls', factor=('atss_centerness',), shrink=tiny.groups
    ),
    'FCOS': _one_stage(
        'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        'conv_cls',
        factor=('conv_centerness',),
        shrink=tiny.groups,
    ),
    'RepPoints': _one_stage('reppoints/reppoints-moment_r50_fpn_1x_coco.py', 'reppoints_cls_out'),
    'FoveaBox': _one_stage('foveabox/fovea_r50_fpn_4xb4-1x_coco.py', 'conv_cls'),
    'CondInst': _one_stage(
        'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py',
        'conv_cls',
        factor=('conv_centerness',),
        shrink=tiny.groups,
    ),
    'PAA': _one_stage(
        'paa/paa_r50_fpn_1x_coco.py',
        'atss_cls',
        factor=('atss_centerness',),
        adapters={'bbox_head': 'LTPAAHead'},
        shrink=tiny.paa,
        rule='paa',
        needs=('sklearn.mixture', 'scikit-learn'),
    ),
    'GFL': _one_stage(
        'gfl/gfl_r50_fpn_1x_coco.py',
        'gfl_cls',
        adapters={'bbox_head': 'LTGFLHead'},
        shrink=tiny.groups,
    ),
    'VFNet': _one_stage(
        'vfnet/vfnet_r50_fpn_1x_coco.py',
        'vfnet_cls',
        adapters={'bbox_head': 'LTVFNetHead'},
        shrink=tiny.groups,
    ),
    'TOOD': _one_stage(
        'tood/tood_r50_fpn_1x_coco.py',
        'tood_cls',
        factor=('cls_prob_module',),
        adapters={'bbox_head': 'LTTOODHead'},
        shrink=tiny.tood,
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
    'DETR': _detr_family('detr/detr_r50_8xb2-150e_coco.py', 'fc_cls', 'LTDETRHead'),
    'DAB-DETR': _detr_family('dab_detr/dab-detr_r50_8xb2-50e_coco.py', 'fc_cls', 'LTDABDETRHead'),
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
    'MaskFormer': Family(
        'maskformer/maskformer_r50_ms-16xb1-75e_coco.py',
        ('panoptic_head',),
        ('cls_embed',),
        'mask2former',
        shrink=tiny.mask2former,
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
        shrink=tiny.mask2former,
    ),
}
