"""Classifier biases, thresholds and the class-wise comparison."""

import math

import pytest
import torch
from mmdet.models.utils import filter_scores_and_topk
from sampling_free_toy import build
from torch import nn

from mmdet_lt import InputError
from mmdet_lt.models.layers.prior_state import (
    ClassThreshold,
    PriorState,
    classifiers,
    iter_biases,
    write_bias,
)


@pytest.mark.parametrize(
    ('kind', 'head', 'layer', 'layout'),
    [
        ('RetinaNet', 'bbox_head', 'retina_cls', 'sigmoid'),
        ('ATSS', 'bbox_head', 'atss_cls', 'sigmoid'),
        ('GFL', 'bbox_head', 'gfl_cls', 'sigmoid'),
        ('FCOS', 'bbox_head', 'conv_cls', 'sigmoid'),
        ('FasterRCNN', 'rpn_head', 'rpn_cls', 'sigmoid'),
        ('FasterRCNN', 'roi_head.bbox_head', 'fc_cls', 'softmax'),
    ],
)
def test_the_classifier_gets_the_prior(kind, head, layer, layout):
    model = build(kind)
    module = model.get_submodule(head)
    assert list(classifiers(module)) == [layer]
    before = {k: v.clone() for k, v in model.named_parameters()}
    assert write_bias(module, classifiers(module)[layer], 0.02) == layout
    bias = classifiers(module)[layer].bias
    if layout == 'sigmoid':
        torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.02))
    else:
        torch.testing.assert_close(bias.softmax(0), torch.tensor([0.02] * 3 + [0.94]))
    changed = [k for k, v in model.named_parameters() if not torch.equal(v, before[k])]
    assert changed == [f'{head}.{layer}.bias']


def test_softmax_anchors_repeat_the_columns():
    head = nn.Module()
    head.num_classes, head.cls_out_channels, head.num_base_priors = 2, 3, 4
    head.use_sigmoid_cls, head.loss_cls = False, nn.Identity()
    head.conv_cls = nn.Conv2d(1, 12, 1)
    assert write_bias(head, head.conv_cls, 0.1) == 'softmax'
    shares = head.conv_cls.bias.view(4, 3).softmax(1)
    torch.testing.assert_close(shares, torch.tensor([[0.1, 0.1, 0.8]]).expand(4, 3))


def test_unknown_layouts_keep_their_bias():
    head = nn.Module()
    head.num_classes, head.loss_cls = 3, nn.Identity()
    head.fc_cls = nn.Linear(2, 5)  # classes and an objectness pair
    before = head.fc_cls.bias.clone()
    assert write_bias(head, head.fc_cls, 0.1) is None
    assert torch.equal(head.fc_cls.bias, before)


def test_a_head_without_classifier_is_refused():
    model = nn.Module()
    model.bbox_head = nn.Module()
    model.bbox_head.cls_convs = nn.Conv2d(1, 3, 1)
    model.bbox_head.cls_out_channels = 3
    with pytest.raises(InputError, match=r'no classifier.*`model\.bbox_head`'):
        list(iter_biases(model, ['bbox_head']))


def test_prior_and_threshold_of_counts():
    state = PriorState({'bbox_head': 3})
    assert not state.measured()
    assert state.class_threshold('bbox_head').isnan().all()
    state.put({'bbox_head': [6, 2, 0, 92]}, dict(data=[1, 2], detector=[3, -4]))
    assert state.measured()
    assert state.prior('bbox_head') == pytest.approx(8 / (100 * 3))
    expected = [8 / 100 * n / 8 for n in (6, 2, 1)]  # a class without rows counts as one row
    torch.testing.assert_close(state.class_threshold('bbox_head'), torch.tensor(expected))
    copy = PriorState({'bbox_head': 3})
    copy.load_state_dict(state.state_dict())
    assert copy.marks() == dict(data=[1, 2], detector=[3, -4])
    assert copy.prior('bbox_head') == state.prior('bbox_head')


def test_counts_above_float32_stay_exact():
    state = PriorState({'bbox_head': 1})
    state.put({'bbox_head': [2.0**24 + 1, 2.0**40 + 1]}, {})
    assert state.rows('bbox_head').tolist() == [2**24 + 1, 2**40 + 1]


def test_counts_of_another_detector_are_refused():
    state = PriorState({'bbox_head': 3})
    with pytest.raises(InputError, match='another detector: expected 4 counts.*found 3'):
        state.put({'bbox_head': [1, 2, 3]}, {})
    with pytest.raises(InputError, match=r"found 0 \(heads \['rpn_head'\]"):
        state.put({'rpn_head': [1, 2]}, {})


def test_data_without_objects_have_no_prior():
    state = PriorState({'bbox_head': 2})
    state.put({'bbox_head': [0, 0, 50]}, {})
    with pytest.raises(InputError, match=r'`model\.bbox_head`.*0 foreground rows and 50'):
        state.prior('bbox_head')


def test_class_thresholds_work_where_heads_compare():
    scores = torch.tensor([[0.3, 0.3], [0.6, 0.6]])
    threshold = ClassThreshold(torch.tensor([0.5, 0.2]))
    kept, labels, index, _ = filter_scores_and_topk(scores, threshold, 10)
    assert sorted(zip(index.tolist(), labels.tolist(), strict=True)) == [(0, 1), (1, 0), (1, 1)]
    flat = scores.reshape(-1) > threshold
    assert flat.tolist() == [False, True, True, True]
    assert math.isclose(kept.min().item(), 0.3, rel_tol=1e-6)


def test_class_thresholds_of_other_shapes():
    threshold = ClassThreshold(torch.tensor([0.5, 0.2]))
    # PAA's score voting has a column for background, which no box belongs to.
    scores = torch.tensor([[0.3, 0.3, 0.9], [0.6, 0.1, 0.9]])
    assert (scores > threshold).tolist() == [[False, True, False], [True, False, False]]
    # Views of maps that are not contiguous.
    scores = torch.tensor([[0.3, 0.6], [0.3, 0.6]]).t()
    assert (scores > threshold).tolist() == [[False, True], [True, True]]
    with pytest.raises(InputError, match=r'scores > score_thr.*`model\.sampling_free\.threshold`'):
        scores >= threshold  # noqa: B015
