"""Configs of Sampling-Free: short, built, of the right kind; mini ones make a training step."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from sampling_free_toy import batch

from mmdet_lt.models.detectors.sampling_free import SamplingFreeMixin
from mmdet_lt.models.roi_heads.chunked_roi_head import ChunkedRoIHead

FOLDER = Path(__file__).resolve().parents[2] / 'configs' / 'sampling_free'
CONFIGS = sorted(FOLDER.glob('*.py'))
MINI = [path for path in CONFIGS if path.stem.endswith('glyph-lvis-mini')]


def load(path):
    cfg = Config.fromfile(str(path))
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    return cfg


def test_the_promised_configs_exist():
    names = {path.stem for path in CONFIGS}
    for start in ('retinanet_r50', 'fcos_r50', 'atss_r50', 'faster-rcnn_r50', 'mask-rcnn_r50'):
        found = [n for n in names if n.startswith(start) and n.endswith('sampling-free_1x_coco')]
        assert len(found) == 1, start
    for start in ('retinanet_r50_fpn', 'faster-rcnn_r50_fpn'):
        assert f'{start}_sampling-free_1x_voc0712' in names
    for peer in ('focal', 'ghm', 'none', 'sampling-free'):
        assert f'retinanet_r18_{peer}_glyph-lvis-mini' in names
    for peer in ('biased-sampling', 'ohem', 'focal', 'none', 'sampling-free'):
        assert f'faster-rcnn_r18_{peer}_glyph-lvis-mini' in names


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_config_builds_and_is_short(path):
    lines = [
        line
        for line in path.read_text().splitlines()
        if line.strip() and not line.startswith(('#', '_base_'))
    ]
    assert len(lines) <= 15
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
    if '2021' in path.stem:
        assert cfg.optim_wrapper.paramwise_cfg.custom_keys.log_sigma.decay_mult == 0


@pytest.mark.parametrize('path', MINI, ids=lambda path: path.stem)
def test_mini_config_takes_a_step(path):
    cfg = load(path)
    if 'sampling-free' in path.stem:
        cfg.model.sampling_free = dict(prior=None, threshold=None)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    total, _ = model.parse_losses(model.loss(*batch()))
    total.backward()
    assert torch.isfinite(total) and total > 0
