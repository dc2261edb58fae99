"""Every config loads, and its model, sampler arguments, metric and hooks exist."""

from pathlib import Path

import pytest
from mmdet.registry import DATA_SAMPLERS, DATASETS, HOOKS, METRICS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

ROOT = Path(__file__).resolve().parents[2] / 'configs'
CONFIGS = sorted(p for p in ROOT.rglob('*.py') if '_base_' not in p.parts)


def test_the_promised_configs_exist():
    names = {p.stem for p in CONFIGS}
    for recipe in ('ce_sample1e-3', 'eql_random', 'eqlv2_random'):
        for schedule in ('1x', '2x'):
            assert f'mask-rcnn_r50_fpn_{recipe}-ms-{schedule}_lvis-v1' in names


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_config_builds(path):
    cfg = Config.fromfile(str(path))
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    head = model.roi_head.bbox_head
    loss = head.loss_cls
    if hasattr(loss, 'set_class_statistics'):
        assert head.fc_cls.out_features == loss.get_cls_channels(head.num_classes)
    else:
        assert head.fc_cls.out_features == head.num_classes + 1
    assert DATASETS.get(cfg.train_dataloader.dataset.type) is not None
    assert DATA_SAMPLERS.get(cfg.train_dataloader.sampler.type) is not None
    assert METRICS.get(cfg.val_evaluator.type) is not None
    hooks = [HOOKS.build(hook) for hook in cfg.custom_hooks]
    assert type(hooks[0]).__name__ == 'ClassStatisticsHook'


def test_two_x_is_twice_as_long():
    one = Config.fromfile(str(ROOT / 'lvis/mask-rcnn_r50_fpn_eqlv2_random-ms-1x_lvis-v1.py'))
    two = Config.fromfile(str(ROOT / 'lvis/mask-rcnn_r50_fpn_eqlv2_random-ms-2x_lvis-v1.py'))
    assert (one.train_cfg.max_epochs, two.train_cfg.max_epochs) == (12, 24)
    assert [s.milestones for s in two.param_scheduler if 'milestones' in s] == [[16, 22]]
    assert one.train_dataloader.batch_size * 8 == one.auto_scale_lr.base_batch_size == 16
    assert one.model.test_cfg.rcnn.max_per_img == 300
