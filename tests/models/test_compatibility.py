"""The matrix of detectors and losses: a representative part, and that its checks catch mistakes."""

from pathlib import Path

import pytest
import torch
from mmdet.models.dense_heads import RetinaHead
from mmdet.registry import MODELS

from mmdet_lt.engine.compatibility import matrix
from mmdet_lt.engine.compatibility.cell import (
    ADAPTED,
    BROKEN,
    MISSING,
    REFUSED,
    WORKS,
    Broken,
    Outcome,
    losses,
    run_cell,
    run_model,
)
from mmdet_lt.engine.compatibility.families import FAMILIES, tiny_config
from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.head_scores import uncounted

PAGE = Path(__file__).parents[2] / 'docs' / 'compatibility.md'
LOSSES = {cls.__name__: cls for cls in losses()}

CELLS = [
    ('Cascade R-CNN', 'SeesawLoss', WORKS, ''),
    ('Double-Head', 'EQLLoss', ADAPTED, 'LTDoubleConvFCBBoxHead'),
    ('SABL', 'SeesawLoss', ADAPTED, 'LTSABLHead'),
    ('SABL', 'BalancedSoftmaxLoss', WORKS, ''),
    ('Sparse R-CNN', 'GumbelLoss', ADAPTED, 'LTDIIHead, LTSparseRoIHead'),
    ('RetinaNet', 'GumbelLoss', WORKS, ''),
    ('RetinaNet', 'SeesawLoss', REFUSED, 'use it in an RoI head'),
    ('GFL', 'EQLLoss', WORKS, ''),
    ('GFL', 'LDAMLoss', ADAPTED, 'LTGFLHead'),
    ('VFNet', 'BalancedSoftmaxLoss', ADAPTED, 'LTVFNetHead'),
    ('TOOD', 'EQLv2Loss', ADAPTED, 'LTTOODHead'),
    ('RTMDet', 'LDAMLoss', ADAPTED, 'LTRTMDetSepBNHead'),
    ('YOLOX', 'EqualizedFocalLoss', ADAPTED, 'LTYOLOXHead'),
    ('YOLOX', 'LogitAdjustedLoss', ADAPTED, 'LTYOLOXHead'),
    ('YOLOF', 'LDAMLoss', REFUSED, 'contain an objectness'),
    ('PISA', 'BalancedSoftmaxLoss', WORKS, ''),
    ('RepPoints', 'EQLv2Loss', WORKS, ''),
    ('DETR', 'EQLLoss', WORKS, ''),
    ('Conditional DETR', 'BalancedSoftmaxLoss', ADAPTED, 'LTConditionalDETRHead'),
    ('RTMDet', 'GHMCLoss', ADAPTED, 'LTRTMDetSepBNHead'),
    ('Conditional DETR', 'LDAMLoss', ADAPTED, 'LTConditionalDETRHead'),
    ('Deformable DETR, two-stage', 'EQLLoss', ADAPTED, 'LTDeformableDETRHead'),
    ('DDQ', 'EQLv2Loss', ADAPTED, 'LTDDQDETRHead'),
    ('DINO', 'LDAMLoss', REFUSED, 'sigmoid losses only'),
    ('Mask2Former', 'BalancedSoftmaxLoss', WORKS, ''),
    ('Mask2Former', 'GumbelLoss', ADAPTED, 'LTMask2FormerHead, LTMaskFormerFusionHead'),
]


@pytest.mark.parametrize(('family', 'loss', 'status', 'detail'), CELLS)
def test_cell(family, loss, status, detail):
    outcome = run_cell(family, LOSSES[loss])
    assert outcome.status == status, outcome.detail
    assert detail in outcome.detail and '\n' not in outcome.detail


# ---- the checks see what is wrong ------------------------------------------------------------


class TakesSigmoids(RetinaHead):
    """Scores of its own, whatever the loss says."""

    follows_loss = True

    def _predict_by_feat_single(self, *args, **kwargs):
        loss, self.loss_cls = self.loss_cls, torch.nn.Identity()
        try:
            return super()._predict_by_feat_single(*args, **kwargs)
        finally:
            self.loss_cls = loss


class CutsOffTheGradient(RetinaHead):
    follows_loss = True

    def loss_by_feat_single(self, cls_score, *args, **kwargs):
        return super().loss_by_feat_single(cls_score.detach() + 0 * cls_score, *args, **kwargs)


class NeverCounts(RetinaHead):
    follows_loss = True

    def loss_by_feat(self, *args, **kwargs):
        with uncounted(self.loss_cls):
            return super().loss_by_feat(*args, **kwargs)


class NotANumber(RetinaHead):
    follows_loss = True

    def loss_by_feat_single(self, *args, **kwargs):
        loss_cls, loss_bbox = super().loss_by_feat_single(*args, **kwargs)
        return loss_cls * float('nan'), loss_bbox


@pytest.mark.parametrize(
    ('head', 'loss', 'message'),
    [
        (TakesSigmoids, 'LDAMLoss', 'scores of class 0 differ'),
        (CutsOffTheGradient, 'EQLv2Loss', 'no gradient in bbox_head.retina_cls'),
        (NeverCounts, 'EQLv2Loss', 'running statistics of EQLv2Loss did not move'),
        (NotANumber, 'EQLLoss', 'loss.* is nan'),
    ],
)
def test_a_wrong_head_is_caught(head, loss, message):
    name = f'test.{head.__name__}'
    MODELS.register_module(name=name, module=head, force=True)
    options = dict(type=f'mmdet_lt.{loss}', use_sigmoid=LOSSES[loss].sigmoid)

    def config():
        config = tiny_config('RetinaNet', options, adapted=False)
        config.bbox_head.type = head
        return config

    with pytest.raises(Broken, match=message):
        run_model(FAMILIES['RetinaNet'], config)


def test_an_error_that_is_no_refusal_makes_a_broken_cell(monkeypatch):
    def fail(*args):
        raise ZeroDivisionError('oh')

    monkeypatch.setattr('mmdet_lt.engine.compatibility.cell.run_model', fail)
    outcome = run_cell('RetinaNet', LOSSES['EQLLoss'])
    assert outcome == Outcome(BROKEN, 'ZeroDivisionError: oh')
    assert matrix.broken_cells({('RetinaNet', 'EQLLoss'): outcome})


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr('mmdet_lt.engine.compatibility.cell._importable', lambda module: False)
    outcome = run_cell('PAA', LOSSES['EQLLoss'])
    assert outcome == Outcome(MISSING, 'scikit-learn')
    assert 'needs scikit-learn, which was not installed' in matrix.page({('PAA', 'x'): outcome}, '')


# ---- the page --------------------------------------------------------------------------------


def test_page_of_a_matrix():
    cells = {
        ('GFL', 'EQLLoss'): Outcome(WORKS),
        ('GFL', 'LDAMLoss'): Outcome(ADAPTED, 'LTGFLHead'),
        ('YOLOF', 'EQLLoss'): Outcome(WORKS),
        ('YOLOF', 'LDAMLoss'): Outcome(REFUSED, 'No.'),
    }
    table, notes = matrix.markdown(cells)
    assert table.splitlines() == [
        '| detector | heads of mmdet_lt | EQL | LDAM |',
        '| --- | --- | --- | --- |',
        '| GFL | `LTGFLHead` | ✓ | LT |',
        '| YOLOF | `LTYOLOFHead` | ✓ | ✗ 1 |',
    ]
    assert notes == '1. No.'


def test_names_are_checked():
    assert matrix.select(['b', 'a'], ['a', 'b', 'c'], '--heads') == ['a', 'b']
    with pytest.raises(InputError, match=r"`--heads` does not know \['d'\]"):
        matrix.select(['d'], ['a'], '--heads')
    with pytest.raises(InputError, match='--jobs'):
        matrix.run_matrix(['GFL'], ['EQLLoss'], jobs=0)


def test_the_page_has_every_detector_and_loss():
    """A new loss needs a new page: tools/analysis/compatibility.py --write."""
    text = PAGE.read_text()
    header = next(line for line in text.splitlines() if line.startswith('| detector'))
    names = [cell.strip() for cell in header.strip('|').split('|')][2:]
    assert names == [name.removesuffix('Loss') for name in LOSSES]
    for family in FAMILIES:
        assert f'\n| {family} |' in text
    assert '**broken**' not in text


@pytest.mark.slow
def test_whole_matrix():
    found = matrix.run_matrix(list(FAMILIES), list(LOSSES), jobs=2)
    assert not matrix.broken_cells(found)
    text = PAGE.read_text()
    for line in matrix.markdown(found)[0].splitlines():
        if '–' not in line:  # not run here
            assert line in text
