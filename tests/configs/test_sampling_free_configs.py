"""Configs of Sampling-Free: short, built, of the right kind; mini ones make a training step."""

from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmdet.registry import HOOKS, MODELS
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import init_default_scope
from sampling_free_toy import batch

from mmdet_lt.models.detectors.sampling_free import SamplingFreeMixin
from mmdet_lt.models.roi_heads.chunked_roi_head import ChunkedRoIHead

FOLDER = Path(__file__).resolve().parents[2] / 'configs' / 'sampling_free'
CONFIGS = sorted(FOLDER.glob('*.py'))
STOCK_VOC = (
    Path(mmdet.__file__).parent / '.mim/configs/pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'
)
MINI = [path for path in CONFIGS if path.stem.endswith('glyph-lvis-mini')]


def load(path):
    cfg = Config.fromfile(str(path))
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    return cfg


def test_the_promised_configs_exist():
    names = {path.stem for path in CONFIGS}
    detectors = ('retinanet_r50', 'fcos_r50', 'atss_r50', 'faster-rcnn_r50', 'mask-rcnn_r50')
    for start in detectors:
        for end in ('1x_coco', '1x_voc0712', '2020_1x_coco', '2021_1x_coco'):
            found = [n for n in names if n.startswith(start) and n.endswith(end)]
            assert len(found) == (3 if end == '1x_coco' else 1), (start, end)
    for detector in ('retinanet', 'fcos', 'atss', 'faster-rcnn', 'mask-rcnn'):
        assert f'{detector}_r18_sampling-free_glyph-lvis-mini' in names
    for peer in ('biased-sampling', 'focal', 'ghm', 'none'):
        assert f'retinanet_r18_{peer}_glyph-lvis-mini' in names
    for peer in ('biased-sampling', 'ohem', 'focal', 'ghm', 'none'):
        assert f'faster-rcnn_r18_{peer}_glyph-lvis-mini' in names


@pytest.mark.parametrize('path', [p for p in CONFIGS if 'voc0712' in p.stem], ids=lambda p: p.stem)
def test_voc_configs_read_voc(path):
    cfg = load(path)
    heads = cfg.model.get('roi_head', cfg.model).bbox_head
    assert heads.num_classes == 20
    data = cfg.train_dataloader.dataset
    if 'mask-rcnn' in path.stem:  # VOC's own annotation has no masks
        assert data.type == 'CocoDataset' and len(data.metainfo.classes) == 20
        assert cfg.model.roi_head.mask_head.num_classes == 20
        assert cfg.val_evaluator.ann_file.startswith(data.data_root)
        return
    stock = Config.fromfile(str(STOCK_VOC))
    for key in ('train_dataloader', 'val_dataloader', 'val_evaluator', 'test_dataloader'):
        mine, theirs = (_plain(c[key].to_dict()) for c in (cfg, stock))
        assert mine == theirs, key
    assert cfg.train_cfg.max_epochs == stock.train_cfg.max_epochs == 4
    assert cfg.param_scheduler[-1].milestones == stock.param_scheduler[-1].milestones


def _plain(config):
    """A config without keys that say nothing."""
    if isinstance(config, dict):
        skipped = ('_scope_', 'backend_args')
        return {k: _plain(v) for k, v in config.items() if k not in skipped}
    if isinstance(config, (list, tuple)):
        return [_plain(v) for v in config]
    return config


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_builds_and_is_short(path):
    if path not in MINI:  # those have no base in MMDetection
        assert len(path.read_text().splitlines()) <= 15
    cfg = load(path)
    with torch.device('meta'):  # shapes only: no memory is filled
        model = MODELS.build(cfg.model)
    hooks = [type(HOOKS.build(hook)).__name__ for hook in cfg.custom_hooks]
    assert hooks[0] == 'ClassStatisticsHook'
    free = 'sampling-free' in path.stem
    assert isinstance(model, SamplingFreeMixin) == free
    assert ('OptimalBiasHook' in hooks) == free
    if not free:
        return
    if hasattr(model, 'roi_head'):
        assert isinstance(model.roi_head, ChunkedRoIHead)
        samplers = (model.rpn_head.sampler, model.roi_head.bbox_sampler)
        assert [type(s).__name__ for s in samplers] == ['PseudoSampler', 'AllSampler']
    else:
        assert type(model.bbox_head.loss_cls).__name__ == 'CrossEntropyLoss'
        assert model.bbox_head.use_sigmoid_cls
    for generation in ('2020', '2021'):
        if generation in path.stem:
            assert model.sampling_free.options.generation == generation


@pytest.mark.parametrize('path', MINI, ids=lambda path: path.stem)
def test_mini_config_takes_a_step(path):
    cfg = load(path)
    if 'sampling-free' in path.stem:
        cfg.model.sampling_free = dict(prior=None, threshold=None)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    inputs, samples = batch()
    if 'mask-rcnn' in path.stem:
        for sample in samples:
            truth = sample.gt_instances
            masks = np.ones((len(truth), 64, 64), np.uint8)
            truth.masks = BitmapMasks(masks, 64, 64)
    losses = model.loss(inputs, samples)
    assert ('loss_mask' in losses) == ('mask-rcnn' in path.stem)
    total, _ = model.parse_losses(losses)
    total.backward()
    assert torch.isfinite(total) and total > 0
