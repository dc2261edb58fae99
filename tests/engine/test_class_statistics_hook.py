"""ClassStatisticsHook and the losses inside real detectors, trained and tested by the Runner."""

import math

import pytest
import torch
from mmdet.models.dense_heads import RetinaHead
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.runner import Runner
from toy import make_toy_coco, toy_config

from mmdet_lt import InputError
from mmdet_lt.engine.checkpoints import read_checkpoint
from mmdet_lt.models.losses.base import _tell_unchecked

LOSSES = {
    'eql': dict(type='mmdet_lt.EQLLoss', use_sigmoid=True, lambda_=0.9),
    'eqlv2': dict(type='mmdet_lt.EQLv2Loss', use_sigmoid=True),
}
HEAD = {'retinanet': 'model.bbox_head', 'faster_rcnn': 'model.roi_head.bbox_head'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toy')
    make_toy_coco(folder, num_images=6)
    return folder


def config(data, work_dir, model, loss, num_classes=3, epochs=1, **overrides) -> Config:
    cfg = toy_config(data, model, num_classes=num_classes, epochs=epochs, overrides=overrides)
    head = cfg
    for part in HEAD[model].split('.'):
        head = head[part]
    head['loss_cls'] = dict(LOSSES[loss]) if isinstance(loss, str) else loss
    cfg.custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook', interval=1)]
    cfg.custom_imports = dict(imports=['mmdet_lt'])
    cfg.work_dir = str(work_dir)
    cfg.log_level = 'ERROR'
    return cfg


def get_head(runner, model):
    return runner.model.bbox_head if model == 'retinanet' else runner.model.roi_head.bbox_head


@pytest.mark.parametrize('model', list(HEAD))
@pytest.mark.parametrize('loss', list(LOSSES))
def test_training_and_scores(data, tmp_path, model, loss):
    runner = Runner.from_cfg(config(data, tmp_path, model, loss))
    runner.train()
    head = get_head(runner, model)
    layer = head.retina_cls if model == 'retinanet' else head.fc_cls
    objectness = model == 'faster_rcnn' and loss == 'eqlv2'
    width = layer.out_channels // head.num_anchors if model == 'retinanet' else layer.out_features
    assert width == 3 + objectness
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())
    if loss == 'eqlv2':
        assert (head.loss_cls.neg_grad > 0).all() and not head.loss_cls.step_driven
    else:
        assert head.loss_cls.tail.tolist() == [1, 1, 1]  # all below 90 % of the images

    # Scores at test must be the loss's own activation, computed here from the logits.
    logits = []
    handle = layer.register_forward_hook(lambda m, i, out: logits.append(out.detach()))
    runner.model.eval()
    with torch.no_grad():
        results = runner.model.test_step(next(iter(runner.train_dataloader)))
    handle.remove()
    if model == 'retinanet':
        z = torch.cat([out.permute(0, 2, 3, 1).reshape(-1, 3) for out in logits])
    else:
        z = torch.cat(logits)
    expected = z[:, :3].sigmoid()
    if objectness:
        expected = expected * (1 - z[:, 3:].sigmoid())
    found = 0
    for sample in results:
        for label, score in zip(
            sample.pred_instances.labels, sample.pred_instances.scores, strict=True
        ):
            assert (expected[:, label] - score).abs().min() < 1e-6
            found += 1
    assert found


def test_statistics_buffers_survive_resume(data, tmp_path):
    overrides = {'train_dataloader.sampler.shuffle': False}
    full = Runner.from_cfg(
        config(data, tmp_path / 'full', 'faster_rcnn', 'eqlv2', epochs=2, **overrides)
    )
    full.train()
    cfg = config(data, tmp_path / 'parts', 'faster_rcnn', 'eqlv2', epochs=2, **overrides)
    cfg.experiment_name = 'parts'
    first = Runner.from_cfg(cfg)
    first.train_loop._max_epochs = 1
    first.train()
    half = first.model.state_dict()
    cfg.update(resume=True, load_from=str(tmp_path / 'parts' / 'epoch_1.pth'))
    cfg.experiment_name = 'resumed'
    resumed = Runner.from_cfg(cfg)
    resumed.train()
    name = 'roi_head.bbox_head.loss_cls.neg_grad'
    assert (resumed.model.state_dict()[name] > half[name]).all()
    assert (full.model.state_dict()[name] > 0).all()
    saved = read_checkpoint(tmp_path / 'parts' / 'epoch_2.pth', 'test')['state_dict']
    assert torch.equal(saved[name], resumed.model.state_dict()[name])
    # Testing needs neither annotations nor the hook.
    assert saved['roi_head.bbox_head.loss_cls.pos_neg'].dtype == torch.float32


def test_resume_with_other_statistics_is_refused(data, tmp_path):
    cfg = config(data, tmp_path, 'faster_rcnn', 'eql')
    Runner.from_cfg(cfg).train()
    cfg = config(data, tmp_path, 'faster_rcnn', dict(LOSSES['eql'], lambda_=0.1), epochs=2)
    cfg.update(resume=True, load_from=str(tmp_path / 'epoch_1.pth'), experiment_name='again')
    with pytest.raises(InputError, match=r'other class statistics.*bbox_head\.loss_cls\.tail'):
        Runner.from_cfg(cfg).train()


@pytest.mark.parametrize('model', list(HEAD))
def test_class_counts_must_agree(data, tmp_path, model):
    cfg = config(data, tmp_path, model, 'eqlv2')
    cfg.merge_from_dict({f'{HEAD[model]}.num_classes': 5})
    key = HEAD[model].replace('.', r'\.')
    with pytest.raises(InputError, match=rf'`{key}\.num_classes` is 5.* are 3'):
        Runner.from_cfg(cfg).train()
    cfg = config(data, tmp_path, model, dict(LOSSES['eqlv2'], num_classes=4))
    cfg.experiment_name = 'second'
    with pytest.raises(InputError, match=rf'is 3, `{key}\.loss_cls\.num_classes` is 4.* are 3'):
        Runner.from_cfg(cfg).train()


def test_dense_heads_need_use_sigmoid_in_the_config(data, tmp_path):
    cfg = config(data, tmp_path, 'retinanet', dict(type='mmdet_lt.EQLv2Loss'))
    with pytest.raises(InputError, match=r'4 columns for 3 classes.*use_sigmoid=True'):
        Runner.from_cfg(cfg).train()


def test_prior_bias_keeps_the_other_defaults(data, tmp_path):
    runner = Runner.from_cfg(
        config(data, tmp_path, 'faster_rcnn', dict(LOSSES['eqlv2'], prior_prob=0.02))
    )
    seen = {}

    def record(*_args, **_kwargs):
        head = runner.model.roi_head.bbox_head
        seen.update({k: v.detach().clone() for k, v in head.named_parameters()})
        raise KeyboardInterrupt  # the first iteration is not wanted

    runner.model.train_step = record
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    expected = torch.full((4,), -math.log(0.98 / 0.02))
    torch.testing.assert_close(seen['fc_cls.bias'], expected)
    assert 0.005 < seen['fc_cls.weight'].std() < 0.015
    assert seen['fc_reg.weight'].std() < 0.002
    assert (seen['shared_fcs.0.bias'] == 0).all()  # Xavier, as MMDetection does


def test_accumulated_batches_are_one_step(data, tmp_path):
    ratios = []
    for batch, counts in ((2, 1), (1, 2)):
        cfg = config(data, tmp_path / str(batch), 'retinanet', 'eqlv2')
        cfg.merge_from_dict(
            {
                'train_dataloader.batch_size': batch,
                'train_dataloader.sampler.shuffle': False,
                'optim_wrapper.accumulative_counts': counts,
                'optim_wrapper.optimizer.lr': 0.0,
                'model.backbone.norm_eval': True,
            }
        )
        cfg.experiment_name = f'accumulate{batch}'
        runner = Runner.from_cfg(cfg)
        runner.train()
        ratios.append(runner.model.bbox_head.loss_cls.pos_neg)
    torch.testing.assert_close(*ratios, rtol=1e-4, atol=1e-5)


def test_gradient_ratio_is_logged(data, tmp_path):
    runner = Runner.from_cfg(config(data, tmp_path, 'retinanet', 'eqlv2'))
    runner.train()
    assert runner.message_hub.get_scalar('train/grad_ratio_r').current() > 0


def test_given_statistics_of_another_set_are_refused(data, tmp_path):
    other = make_toy_coco(tmp_path / 'other', num_classes=2)
    cfg = config(data, tmp_path, 'faster_rcnn', 'eql')
    cfg.custom_hooks[0]['class_statistics'] = str(other)
    with pytest.raises(InputError, match='of another data set.*class_2'):
        Runner.from_cfg(cfg).train()


def test_metrics_get_the_training_statistics(data, tmp_path):
    """COCO files have no frequency groups; with thresholds the three toy classes get them."""
    cfg = config(data, tmp_path, 'retinanet', 'eqlv2')
    cfg.custom_hooks[0]['thresholds'] = (0, 3)
    cfg.val_dataloader = cfg.test_dataloader
    cfg.val_evaluator = dict(type='mmdet_lt.LVISMetric', ann_file=str(data / 'train.json'))
    cfg.val_cfg = dict(type='ValLoop')
    cfg.train_cfg.val_interval = 1
    runner = Runner.from_cfg(cfg)
    runner.train()
    groups = set(runner.val_loop.evaluator.metrics[0].class_statistics.groups)
    assert groups <= {'c', 'f'}
    values = {k: runner.message_hub.get_scalar(f'val/lvis/bbox_AP{k}').current() for k in 'rcf'}
    assert {k for k, v in values.items() if v >= 0} == groups

    cfg.test_evaluator = cfg.val_evaluator
    cfg.load_from = str(tmp_path / 'epoch_1.pth')
    cfg.experiment_name = 'test only'
    result = Runner.from_cfg(cfg).test()
    assert result['lvis/bbox_APr'] >= 0  # at most ten images each: all rare by default


# ---- runs that only test ---------------------------------------------------------------------


class SigmoidAnyway(RetinaHead):
    """Scores of its own, whatever the loss says."""

    def _predict_by_feat_single(self, *args, **kwargs):
        loss, self.loss_cls = self.loss_cls, torch.nn.Identity()
        try:
            return super()._predict_by_feat_single(*args, **kwargs)
        finally:
            self.loss_cls = loss


@pytest.mark.parametrize('mode', ['test', 'val'])
def test_a_wrong_head_is_not_scored(data, tmp_path, mode):
    """Without a training set, and before a checkpoint is looked for."""
    MODELS.register_module(module=SigmoidAnyway, force=True)
    cfg = config(data, tmp_path, 'retinanet', dict(type='mmdet_lt.GumbelLoss', use_sigmoid=True))
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.val_dataloader, cfg.val_evaluator = cfg.test_dataloader, cfg.test_evaluator
    cfg.val_cfg = dict(type='ValLoop')
    cfg.load_from = str(tmp_path / 'missing.pth')
    runner = Runner.from_cfg(cfg)
    with pytest.raises(FileNotFoundError):  # GumbelLoss in RetinaHead is right
        getattr(runner, mode)()
    assert runner.model.bbox_head.loss_cls._num_classes is None  # left to the checkpoint
    cfg.model.bbox_head.type = 'SigmoidAnyway'
    cfg.experiment_name = f'wrong {mode}'
    with pytest.raises(InputError, match='SigmoidAnyway cannot be used with GumbelLoss'):
        getattr(Runner.from_cfg(cfg), mode)()


def test_a_test_run_needs_no_training_file(data, tmp_path):
    Runner.from_cfg(config(data, tmp_path, 'retinanet', 'eqlv2')).train()
    cfg = config(data, tmp_path, 'retinanet', 'eqlv2')
    cfg.train_dataloader.dataset.ann_file = 'missing.json'
    cfg.load_from = str(tmp_path / 'epoch_1.pth')
    cfg.experiment_name = 'test only'
    runner = Runner.from_cfg(cfg)
    assert runner.test()
    assert (runner.model.bbox_head.loss_cls.neg_grad > 0).all()
    narrow = cfg.copy()
    narrow.model.bbox_head.num_classes -= 1
    narrow.experiment_name = 'fewer classes'
    with pytest.raises(InputError, match=r'epoch_1.pth.*`bbox_head.retina_cls.*num_classes'):
        Runner.from_cfg(narrow).test()
    cfg.model.bbox_head.loss_cls.pop('use_sigmoid')
    cfg.experiment_name = 'wrong width'
    with pytest.raises(InputError, match='use_sigmoid=True'):
        Runner.from_cfg(cfg).test()


@pytest.mark.parametrize('hooked', [True, False])
def test_a_loss_nobody_checked_says_so(data, tmp_path, hooked):
    _tell_unchecked.cache_clear()
    cfg = config(data, tmp_path, 'retinanet', dict(type='mmdet_lt.BCELoss', use_sigmoid=True))
    cfg.log_level, cfg.experiment_name = 'WARNING', f'hooked {hooked}'  # a logger of its own
    if not hooked:
        cfg.custom_hooks = []
    Runner.from_cfg(cfg).train()
    text = ''.join(path.read_text() for path in tmp_path.glob('*/*.log'))
    assert ('BCELoss trains without ClassStatisticsHook' in text) is not hooked
