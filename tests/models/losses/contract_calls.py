"""Checks of one call: values, gradients, targets, weights, divisors, reductions, precision."""

from __future__ import annotations

import pytest
import torch
from contract_cases import C, Case, Result, assert_finite, assert_same, check, rows, run

from mmdet_lt import InputError


@check
def finite_for_every_batch(case: Case) -> None:
    """One, few and 1,203 classes; mixed rows, no foreground, only foreground, one class."""
    for context in case.contexts:
        for num_classes in (1, 3, 80, 1203):
            loss = case.build(context, num_classes)
            z, label, weight = rows(loss, 7)
            result = run(loss, z, label, weight, avg_factor=3)
            assert_finite(result)
            assert result.value.shape == () and result.value.dtype == torch.float32
            assert result.grad.abs().sum() > 0
            if num_classes == 80:
                continue
            for labels in (torch.full_like(label, num_classes), label % num_classes, label * 0):
                assert_finite(run(loss, z, labels))
            assert_finite(run(loss, z[:1], label[1:2]))


@check
def extreme_logits(case: Case) -> None:
    """±1e4 stays finite; a confident mistake still has a gradient."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, weight = rows(loss)
        for size in (1e4, -1e4):
            for reduction in ('mean', 'none'):
                for target in (label, torch.full_like(label, C), torch.zeros_like(label)):
                    result = run(loss, size * z.sign(), target, weight, None, reduction)
                    assert_finite(result)
        if not case.tags.bounded_logits:
            keep = label < C
            wrong = 40 * run(loss, 0 * z[keep], label[keep]).grad.sign()
            grad = run(loss, wrong, label[keep]).grad
            assert ((grad * wrong).sum(1) > 0).all()


@check
def empty_batch(case: Case) -> None:
    """No rows: zero with a gradient of the right shape, state untouched."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, weight = rows(loss, 0)
        soft = torch.zeros(0, C)
        for target, given in ((label, None), (label, weight), (soft, z), ((label, weight), weight)):
            for reduction, avg in (('mean', 0), ('sum', None), ('none', None)):
                result = run(loss, z, target, given, avg, reduction)
                assert result.value.sum() == 0 and result.grad.shape == z.shape
                assert_state_untouched(loss, result)
        z = z.requires_grad_()
        assert loss(z, label).requires_grad and loss(z, label).shape == ()


@check
def weights(case: Case) -> None:
    """None is ones; (N,), (N, K) and (N, C) say the same; weights scale the loss."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, weight = rows(loss)
        wanted = run(loss, z, label, avg_factor=4)
        assert_same(run(loss, z, label, torch.ones(12), avg_factor=4), wanted)
        wanted = run(loss, z, label, weight, avg_factor=4)
        for columns in {z.shape[1], C}:
            matrix = weight[:, None].repeat(1, columns)
            assert_same(run(loss, z, label, matrix, avg_factor=4), wanted)
        assert_same(run(loss, z, label, weight.double(), avg_factor=4), wanted)
        if not case.tags.own_normalizer:
            half = run(loss.eval(), z, label, 0.5 * weight, avg_factor=4)
            whole = run(loss, z, label, weight, avg_factor=4)
            assert_same(half, whole, 0.5)


@check
def ignored_rows(case: Case) -> None:
    """A row of weight 0 changes neither loss nor gradient nor state, whatever is in it."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, weight = rows(loss)
        weight[2:5] = 0
        for target in (label, torch.eye(C + 1)[label][:, :C]):
            result = run(loss, z, target, weight, avg_factor=4)
            assert (result.grad[2:5] == 0).all() and (result.grad[5:] != 0).any()
            if not case.tags.stochastic:
                keep = weight > 0
                fewer = run(loss, z[keep], target[keep], weight[keep], avg_factor=4)
                whole = Result(result.value, result.grad[keep], result.state)
                assert_same(whole, fewer)
            nothing = run(loss, z, target, torch.zeros(12), avg_factor=4)
            assert nothing.value == 0 and (nothing.grad == 0).all()
            assert_state_untouched(loss, nothing)
        if case.cls.sigmoid:
            matrix = torch.ones_like(z)
            matrix[:, 1] = 0
            assert (run(loss, z, label, matrix).grad[:, 1] == 0).all()


@check
def avg_factor(case: Case) -> None:
    """A divisor in every form a head has; 0 counts as 1; without one, rows divide."""
    forms = [(7, 7), (2.5, 2.5), (torch.tensor(3), 3), (torch.tensor([0.5]), 0.5)]
    forms += [(0, 1), (0.0, 1), (torch.tensor(0.0), 1), (torch.zeros(1), 1), (None, 12)]
    for context in case.contexts:
        loss = case.build(context).eval()
        z, label, weight = rows(loss)
        total = run(loss, z, label, weight, reduction_override='sum')
        own = run(loss, z, label, weight)
        for given, divisor in forms:
            result = run(loss, z, label, weight, avg_factor=given)
            assert result.value.shape == ()
            if case.tags.own_normalizer:
                assert_same(result, own)
            else:
                assert_same(result, total, 1 / divisor)
        with pytest.raises(ValueError, match='avg_factor'):
            loss(z, label, weight, avg_factor=2, reduction_override='sum')


@check
def reductions(case: Case) -> None:
    """'none' gives (N, K) or (N,), which sum to 'sum'; the constructor's word is the default."""
    for context in case.contexts:
        loss = case.build(context)
        if case.tags.running:  # they may see the batch first, but not with 'none'
            loss.eval()
        z, label, weight = rows(loss)
        none = run(loss, z, label, weight, reduction_override='none')
        assert none.value.shape == (z.shape if case.cls.sigmoid else label.shape)
        total = run(loss, z, label, weight, reduction_override='sum')
        assert_same(Result(none.value.sum(), none.grad, none.state), total)
        for word in ('none', 'mean', 'sum'):
            other = case.build(context, reduction=word, loss_weight=3.0).train(loss.training)
            override = run(loss, z, label, weight, reduction_override=word)
            assert_same(run(other, z, label, weight), override, 3.0)
        for word in ('avg', 'batchmean', 3):
            with pytest.raises(InputError, match='reduction'):
                loss(z, label, reduction_override=word)
            with pytest.raises(InputError, match='reduction'):
                case.build(context, reduction=word)


@check
def order_of_rows(case: Case) -> None:
    """Rows may come in any order."""
    if case.tags.stochastic:
        return
    for context in case.contexts:
        loss = case.build(context)
        z, label, weight = rows(loss)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        moved = run(loss, z[order], label[order], weight[order], avg_factor=3)
        wanted = run(loss, z, label, weight, avg_factor=3)
        assert_same(moved, Result(wanted.value, wanted.grad[order], wanted.state))


@check
def labels(case: Case) -> None:
    """Everything outside of [0, C) is background; any integer type will do."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, _ = rows(loss)
        wanted = run(loss, z, label)
        strange = label.clone()
        strange[label == C] = torch.tensor([-1, C + 1, 10_000, -100])
        assert_same(run(loss, z, strange), wanted, rtol=1e-6)
        assert_same(run(loss, z, label.int()), wanted, rtol=1e-6)


@check
def soft_targets(case: Case) -> None:
    """One-hot matrices say the same as labels; qualities the same as their matrix."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, weight = rows(loss)
        wanted = run(loss, z, label, weight, avg_factor=3)
        one_hot = torch.eye(C + 1)[label]
        for target in (one_hot[:, :C], one_hot, one_hot.double(), (label, torch.ones(12))):
            assert_same(run(loss, z, target, weight, avg_factor=3), wanted)
        quality = torch.linspace(0.1, 1, 12)
        pair = run(loss, z, (label, quality), weight, avg_factor=3)
        matrix = run(loss, z, one_hot[:, :C] * quality[:, None], weight, avg_factor=3)
        assert_same(pair, matrix)
        spread = torch.softmax(z.flip(0)[:, :C], 1) * 0.9
        for reduction in ('mean', 'sum', 'none'):
            assert_finite(run(loss, z, spread, weight, None, reduction))
        for bad in (label.float(), one_hot[:, : C - 1], label[:3], label > 0, (label, label[:2])):
            with pytest.raises(InputError):
                loss(z, bad)


@check
def precision(case: Case) -> None:
    """float32 agrees with float64; half precision, also under autocast, is computed in float32."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, weight = rows(loss, 40)
        for target in (label, torch.eye(C + 1)[label][:, :C] * 0.7):
            exact = run(loss, z.double(), target, weight.double(), avg_factor=3)
            assert exact.value.dtype == torch.float64
            assert_same(run(loss, z, target, weight, avg_factor=3), exact, rtol=1e-3)
        for dtype in (torch.float16, torch.bfloat16):
            low = z.to(dtype)
            wanted = run(loss, low.float(), label, weight, avg_factor=3)
            for autocast in (False, True):
                with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
                    same = run(loss, low, label, weight, avg_factor=3)
                assert same.value.dtype == torch.float32 and same.grad.dtype == dtype
                torch.testing.assert_close(same.value, wanted.value, rtol=1e-5, atol=1e-6)
                close = dict(rtol=2e-2, atol=1e-4, check_dtype=False)
                torch.testing.assert_close(same.grad, wanted.grad, **close)
                assert all(value.dtype == torch.float32 for value in same.state.values())


@check
def class_weight(case: Case) -> None:
    """Factors of classes: positive entries of sigmoid losses, rows of softmax losses."""
    for context in case.contexts:
        loss = case.build(context).eval()
        z, label, weight = rows(loss)
        plain = run(loss, z, label, weight, reduction_override='none').value
        ones = case.build(context, class_weight=[1.0] * C).eval()
        none = run(ones, z, label, weight, reduction_override='none').value
        torch.testing.assert_close(none, plain)
        factors = torch.tensor([2.0, 1.0, 0.5, 1.0, 3.0, 0.25])
        for given, factor in (
            (2.0, torch.tensor([2.0] * C + [1.0])),
            (factors[:C].tolist(), factors.where(torch.arange(C + 1) < C, 1)),
            (factors.tolist(), factors),
        ):
            weighted = case.build(context, class_weight=given).eval()
            got = run(weighted, z, label, weight, reduction_override='none').value
            wanted = plain * factor[label] if plain.dim() == 1 else plain.clone()
            if plain.dim() == 2:
                index = label[:, None].clamp(max=z.shape[1] - 1)
                inside = (label < z.shape[1])[:, None]
                scaled = torch.where(inside, factor[label][:, None], 1) * plain.gather(1, index)
                wanted.scatter_(1, index, scaled)
            if not case.tags.own_normalizer:
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
            assert_finite(run(weighted.train(), z, label, weight))
        for bad in ([1.0] * (C + 3), [-1.0] * C):
            with pytest.raises(InputError, match='class_weight'):
                case.build(context, class_weight=bad)


def assert_state_untouched(loss: torch.nn.Module, result: Result) -> None:
    """The copy that was run remembers what ``loss`` does."""
    for name, value in loss.named_buffers():
        before, after = value, result.state[name]
        if name == 'pending' and before.shape != after.shape:
            assert not after.any(), name
        else:
            torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
