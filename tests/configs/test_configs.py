"""Every config loads, and its model, sampler arguments, metric and hooks exist."""

import functools
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmdet.registry import DATA_SAMPLERS, DATASETS, HOOKS, METRICS, MODELS
from mmengine.config import Config
from mmengine.config import utils as config_utils
from mmengine.registry import init_default_scope

ROOT = Path(__file__).resolve().parents[2] / 'configs'
# Those of Sampling-Free are of other data and detectors and have a test of their own.
OTHERS = {'_base_', 'sampling_free'}
CONFIGS = sorted(p for p in ROOT.rglob('*.py') if not OTHERS & set(p.parts))


@pytest.fixture(scope='module', autouse=True)
def _read_metafiles_once():
    """MMEngine parses a hundred YAML files for every base of another package."""
    with mock.patch.object(config_utils, 'load', functools.cache(config_utils.load)):
        yield


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
    with torch.device('meta'):  # shapes only: no memory is filled
        model = MODELS.build(cfg.model)
    if hasattr(model, 'roi_head'):
        check_two_stage(model.roi_head.bbox_head)
    else:
        check_one_stage(model.bbox_head)
    assert DATASETS.get(cfg.train_dataloader.dataset.type) is not None
    assert DATA_SAMPLERS.get(cfg.train_dataloader.sampler.type) is not None
    assert METRICS.get(cfg.val_evaluator.type) is not None
    hooks = [HOOKS.build(hook) for hook in cfg.custom_hooks]
    assert type(hooks[0]).__name__ == 'ClassStatisticsHook'
    masks = hasattr(model, 'roi_head') and model.roi_head.with_mask
    metrics = cfg.val_evaluator.metric
    assert ('segm' in metrics) == masks and 'bbox' in metrics


def check_two_stage(head):
    loss, columns = head.loss_cls, head.num_classes + 1
    if hasattr(loss, 'set_class_statistics'):
        columns = loss.get_cls_channels(head.num_classes)
    assert head.fc_cls.out_features == columns


def check_one_stage(head):
    loss, columns = head.loss_cls, head.num_classes
    if hasattr(loss, 'set_class_statistics'):
        columns = loss.dense_columns(head.num_classes)
    assert head.retina_cls.out_channels == head.num_anchors * columns


def test_one_stage_recipes_follow_lvis():
    cfg = Config.fromfile(str(ROOT / 'lvis/retinanet_r50_fpn_focal_random-ms-1x_lvis-v1.py'))
    assert cfg.model.bbox_head.num_classes == 1203
    assert cfg.model.test_cfg.max_per_img == 300 and cfg.model.test_cfg.score_thr == 1e-4
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    two_stage = Config.fromfile(str(ROOT / 'lvis/mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'))
    for loader in ('train_dataloader', 'val_dataloader'):
        ours, theirs = cfg[loader].dataset, two_stage[loader].dataset
        assert (ours.type, ours.ann_file) == (theirs.type, theirs.ann_file)
    resize, other = (c.train_dataloader.dataset.pipeline[2] for c in (cfg, two_stage))
    assert resize.type == other.type == 'RandomChoiceResize'
    assert [tuple(scale) for scale in resize.scales] == [tuple(scale) for scale in other.scales]


def test_two_x_is_twice_as_long():
    one = Config.fromfile(str(ROOT / 'lvis/mask-rcnn_r50_fpn_eqlv2_random-ms-1x_lvis-v1.py'))
    two = Config.fromfile(str(ROOT / 'lvis/mask-rcnn_r50_fpn_eqlv2_random-ms-2x_lvis-v1.py'))
    assert (one.train_cfg.max_epochs, two.train_cfg.max_epochs) == (12, 24)
    assert [s.milestones for s in two.param_scheduler if 'milestones' in s] == [[16, 22]]
    assert one.train_dataloader.batch_size * 8 == one.auto_scale_lr.base_batch_size == 16
    assert one.model.test_cfg.rcnn.max_per_img == 300


@pytest.mark.parametrize('path', sorted((ROOT / 'decoupled').glob('*.py')), ids=lambda p: p.stem)
def test_second_stages_keep_their_data_order_over_a_resume(path):
    cfg = Config.fromfile(str(path))
    hooks = {hook.type for hook in cfg.custom_hooks}
    if cfg.train_dataloader.sampler.type.startswith('mmdet_lt.'):
        assert 'mmdet_lt.SamplerStateHook' in hooks
    if 'tau-norm' not in path.stem:
        assert {'mmdet_lt.FreezeHook', 'mmdet_lt.ClassifierInitHook'} <= hooks
        assert cfg.get('load_from') is None  # train_stages.py brings it
