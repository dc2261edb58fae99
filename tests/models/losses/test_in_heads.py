"""Every registered loss in the heads of a Faster R-CNN and a RetinaNet.

The detectors are built once; each test puts a new head with its loss on them, so that the head
asks the loss for its width, trains one step and predicts.
"""

import copy

import pytest
import torch
from contract_cases import registered_losses, statistics
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from toy_models import faster_rcnn, retinanet

from mmdet_lt import InputError
from mmdet_lt.engine.hooks.class_counts import check_class_counts

C = 6
LOSSES = registered_losses()
DENSE = [cls for cls in LOSSES if cls().dense_columns(C) is not None]
ROI_ONLY = [cls for cls in LOSSES if cls not in DENSE]


class Stage:
    """Features of one image for a detector whose classification head is exchanged."""

    def __init__(self, config, seed=0):
        init_default_scope('mmdet')
        torch.manual_seed(seed)
        self.config = ConfigDict(config)
        self.model = MODELS.build(self.config)
        self.model.init_weights()
        meta = dict(img_shape=(64, 64), ori_shape=(64, 64), batch_input_shape=(64, 64))
        sample = DetDataSample(metainfo=dict(meta, pad_shape=(64, 64), scale_factor=(1.0, 1.0)))
        boxes = torch.tensor([[4.0, 4, 30, 34], [24, 20, 60, 60], [34, 6, 58, 30]])
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 2, C - 1]))
        self.samples = [sample]
        images = torch.randn(1, 3, 64, 64)
        self.two_stage = hasattr(self.model, 'roi_head')
        with torch.no_grad():
            self.features = self.model.extract_feat(images)
            if self.two_stage:
                self.proposals = self.model.rpn_head.predict(self.features, self.samples)

    def new_head(self, loss):
        """The detector's new head, with ``loss``."""
        owner, config = self.model, self.config
        if self.two_stage:
            owner, config = owner.roi_head, config.roi_head
        config = copy.deepcopy(config.bbox_head)
        config.loss_cls = loss
        if not self.two_stage:
            config.update(train_cfg=self.config.train_cfg, test_cfg=self.config.test_cfg)
        owner.bbox_head = head = MODELS.build(config)
        head.init_weights()
        check_class_counts(self.model, statistics(C))
        head.loss_cls.set_class_statistics(statistics(C))
        return head

    def call(self, what):
        """``loss`` or ``predict`` of the part of the detector behind the features."""
        if self.two_stage:
            proposals = copy.deepcopy(self.proposals)
            return getattr(self.model.roi_head, what)(self.features, proposals, self.samples)
        return getattr(self.model.bbox_head, what)(self.features, self.samples)


@pytest.fixture(scope='module')
def two_stage():
    return Stage(faster_rcnn(C))


@pytest.fixture(scope='module')
def one_stage():
    return Stage(retinanet(C))


def train_and_predict(stage, cls, layer_name):
    """One step; returns the head, the logits of its classifier and the detections."""
    head = stage.new_head(dict(type=f'mmdet_lt.{cls.__name__}', use_sigmoid=cls.sigmoid))
    layer = getattr(head, layer_name)
    if cls.tags.bounded_logits and head.loss_cls.prior_bias() is not None:
        # The bias of a dense head is made for a sigmoid; the page of such a loss says what to set.
        torch.nn.init.constant_(layer.bias, head.loss_cls.prior_bias())
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    torch.manual_seed(0)
    losses = stage.call('loss')
    total, _ = stage.model.parse_losses(losses)
    assert any('loss_cls' in key for key in losses)
    total.backward()
    assert torch.isfinite(layer.weight.grad).all() and layer.weight.grad.any()
    optimizer.step()
    assert torch.isfinite(layer.weight).all() and not torch.equal(layer.weight, before)

    logits = []
    handle = layer.register_forward_hook(lambda module, inputs, out: logits.append(out))
    stage.model.eval()
    with torch.no_grad():
        found = stage.call('predict')[0]
    stage.model.train()
    handle.remove()
    return head, logits, found


def assert_scores(found, expected):
    """Every detection has the score that the loss gives its label somewhere."""
    assert len(found) and found.labels.max() < C
    for label, score in zip(found.labels, found.scores, strict=True):
        assert (expected[:, label] - score).abs().min() < 1e-6


@pytest.mark.parametrize('cls', LOSSES, ids=lambda cls: cls.__name__)
def test_two_stage(cls, two_stage):
    head, logits, found = train_and_predict(two_stage, cls, 'fc_cls')
    assert head.loss_cls.context == 'roi'
    assert head.fc_cls.out_features == head.loss_cls.get_cls_channels(C)
    assert_scores(found, head.loss_cls.get_activation(logits[0]))


@pytest.mark.parametrize('cls', DENSE, ids=lambda cls: cls.__name__)
def test_one_stage(cls, one_stage):
    head, logits, found = train_and_predict(one_stage, cls, 'retina_cls')
    columns = head.loss_cls.dense_columns(C)
    assert head.loss_cls.context == 'dense'
    assert head.retina_cls.out_channels == head.num_anchors * columns
    rows = torch.cat([out.permute(0, 2, 3, 1).reshape(-1, columns) for out in logits])
    assert_scores(found, head.loss_cls.get_activation(rows))


@pytest.mark.parametrize('cls', ROI_ONLY, ids=lambda cls: cls.__name__)
def test_one_stage_is_refused_where_columns_are_missing(cls, one_stage):
    loss = dict(type=f'mmdet_lt.{cls.__name__}', use_sigmoid=cls.sigmoid)
    with pytest.raises(InputError, match='use it in an RoI head'):
        one_stage.new_head(loss)


@pytest.mark.parametrize('cls', DENSE, ids=lambda cls: cls.__name__)
def test_one_stage_needs_use_sigmoid_in_the_config(cls, one_stage):
    """Without the key a dense head builds the columns of a softmax."""
    loss = dict(type=f'mmdet_lt.{cls.__name__}')
    if cls.sigmoid:
        with pytest.raises(InputError, match='use_sigmoid=True'):
            one_stage.new_head(loss)
    else:
        one_stage.new_head(loss)
