"""Checks of widths, scores and accuracy, and of what the constructor and the docs say."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from contract_cases import C, Case, assert_same, check, rows, run, set_seed, statistics, width
from mmdet.registry import MODELS as HOST_MODELS

from mmdet_lt import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.losses.sigmoid_loss import SigmoidLoss


@check
def widths_and_scores(case: Case) -> None:
    """RoI heads: C + 1 scores, background last; dense heads: C scores."""
    for context in case.contexts:
        for num_classes in (1, 3, 80):
            loss = case.build(context, num_classes)
            assert loss.context == context
            if context == 'roi':
                assert loss.get_cls_channels(num_classes) == num_classes + loss.extra_columns
            else:
                assert loss.dense_columns(num_classes) == num_classes + loss.extra_columns_dense
            z = rows(loss)[0]
            for logits in (z, 1e4 * z, z.half(), z[:0]):
                scores = loss.get_activation(logits)
                assert scores.shape == (len(logits), num_classes + (context == 'roi'))
                assert scores.dtype == torch.float32
                assert (scores >= 0).all() and (scores <= 1 + 1e-6).all()
    loss = case.build()
    for extra in (-1, 7):
        with pytest.raises(InputError, match='found'):
            loss(torch.zeros(2, C + extra), torch.zeros(2, dtype=torch.long))
        with pytest.raises(InputError, match='found'):
            loss.get_activation(torch.zeros(2, C + extra))


@check
def descent_learns_the_labels(case: Case) -> None:
    """Logits that follow the gradient end with the label's score on top, and full accuracy."""
    for context in case.contexts:
        loss = case.build(context).eval()
        label = torch.arange(C + 1).repeat(2)
        z = torch.zeros(len(label), width(loss))
        set_seed(0)
        for _ in range(40):
            x = z.requires_grad_()
            (grad,) = torch.autograd.grad(loss(x, label), x)
            z = (x - 0.5 * grad / grad.abs().amax(1, keepdim=True).clamp_min(1e-12)).detach()
        foreground = loss.get_activation(z)[:, :C]
        best, found = foreground.max(1)
        assert torch.equal(found[label < C], label[label < C])
        assert best[label < C].min() > best[label == C].max()
        accuracy = loss.get_accuracy(z, label)
        assert set(accuracy) == {'acc'} and accuracy['acc'] == 100


@check
def accuracy(case: Case) -> None:
    """A dict with a percentage; 0 for no rows; strange labels are background."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, _ = rows(loss, 30)
        result = loss.get_accuracy(z, label)
        predicted = loss.predict(z)
        assert set(result) == {'acc'} and result['acc'].shape == ()
        expected = 100 * (predicted == label).float().mean()
        torch.testing.assert_close(result['acc'], expected)
        assert predicted.dtype == torch.int64
        assert predicted.min() >= 0 and predicted.max() <= C
        strange = label.masked_fill(label == C, -1)
        assert loss.get_accuracy(z, strange)['acc'] == result['acc']
        empty = loss.get_accuracy(z[:0], label[:0])
        assert set(empty) == {'acc'} and empty['acc'] == 0


@check
def random_numbers(case: Case) -> None:
    """Equal seeds give equal steps; other seeds differ only where the tags say so."""
    for context in case.contexts:
        loss = case.build(context, 80)
        z, label, weight = rows(loss, 30)
        results = [run(loss, z, label, weight, seed=seed) for seed in (0, 0, 1, 2, 3)]
        assert_same(results[1], results[0], rtol=0)
        if not case.tags.stochastic:
            for other in results[2:]:
                assert_same(other, results[0], rtol=0)
        elif not case.kwargs:
            assert any(not torch.equal(r.grad, results[0].grad) for r in results[2:])


@check
def arguments(case: Case) -> None:
    """What contradicts the loss, or is unknown, is refused by name."""
    cls, sigmoid = case.cls, case.cls.sigmoid
    assert cls(use_sigmoid=sigmoid, **case.kwargs).use_sigmoid == sigmoid
    with pytest.raises(InputError, match='use_sigmoid'):
        cls(use_sigmoid=not sigmoid, **case.kwargs)
    with pytest.raises(TypeError):
        cls(no_such_argument=1, **case.kwargs)
    for bad in (0, -3):
        with pytest.raises(InputError, match='num_classes'):
            cls(**{**case.kwargs, 'num_classes': bad})
    for bad in (0.0, 1.5) if sigmoid else (0.1,):
        with pytest.raises(InputError, match='prior_prob'):
            cls(**{**case.kwargs, 'prior_prob': bad})
    loss = case.build()
    assert cls.__name__ in repr(loss)
    assert loss.custom_cls_channels and loss.custom_activation and loss.custom_accuracy
    z, label, _ = rows(loss)
    for bad_call in (
        lambda: loss(z[None], label[None]),
        lambda: loss(z, label, torch.ones(3)),
        lambda: loss(z, label, torch.ones(12, C + 9)),
        lambda: loss.set_class_statistics(statistics(C + 1)),
    ):
        with pytest.raises(InputError):
            bad_call()
    if case.tags.statistics and not case.kwargs:
        with pytest.raises(InputError, match='ClassStatisticsHook'):
            case.cls(**case.kwargs, num_classes=C)(z, label)
        given = case.cls(**case.kwargs, class_statistics=statistics(C))
        given.get_cls_channels(C)
        assert_same(run(given, z, label), run(loss, z, label), rtol=0)


@check
def prior_bias(case: Case) -> None:
    """A classifier that starts at the bias starts at the probability."""
    bias = case.build().prior_bias()
    assert bias is None or isinstance(bias, float)
    if not issubclass(case.cls, SigmoidLoss):
        assert bias is None
        return
    assert case.build(prior_prob=None).prior_bias() is None
    loss = case.build(prior_prob=0.02)
    score = loss.link(torch.tensor(loss.prior_bias()))
    assert score.item() == pytest.approx(0.02, rel=1e-4)


@check
def built_by_name(case: Case) -> None:
    """MMDetection's registry finds the loss by scope and name."""
    name = case.cls.__name__
    loss = HOST_MODELS.build(dict(type=f'mmdet_lt.{name}', use_sigmoid=case.cls.sigmoid))
    assert type(loss) is case.cls


@check
def documentation(case: Case) -> None:
    """The module has paper and formula, the class every argument and buffer."""
    module = sys.modules[case.cls.__module__].__doc__ or ''
    tags = case.tags
    assert tags.title and tags.url in module and '.. math::' in module
    assert tags.url.startswith('https://') and any(year.isdigit() for year in tags.paper.split())
    doc = case.cls.__doc__ or ''
    own = inspect.signature(case.cls.__init__).parameters
    base = inspect.signature(LongTailLoss.__init__).parameters
    for name, parameter in own.items():
        if name not in base and parameter.kind is not parameter.VAR_KEYWORD:
            assert f'{name}:' in doc, f'argument {name} is not described'
    for name in case.build().state_dict():
        assert f'``{name}``' in doc, f'buffer {name} is not described'
