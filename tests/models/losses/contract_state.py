"""Checks of what a loss remembers, of what it must not touch, and of waiting for the device."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from contract_cases import (
    C,
    Case,
    assert_same,
    assert_same_state,
    check,
    rows,
    run,
    set_seed,
    state,
)
from mmengine.logging import MessageHub
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_lt import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.losses.running import RunningStatistics, flush


def batches(loss: LongTailLoss, steps: int, first: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Different rows for each step."""
    for seed in range(first, first + steps):
        yield rows(loss, 11, seed)


def train(loss: LongTailLoss, steps: int, first: int = 0) -> list[float]:
    """Values of some training calls."""
    values = []
    for z, label, weight in batches(loss, steps, first):
        set_seed(0)
        value = loss(z.requires_grad_(), label, weight, avg_factor=5)
        value.backward()
        values.append(value.item())
    return values


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors held by an object's attributes, also inside of containers."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, depth - 1)
    elif depth and hasattr(value, '__dict__') and not isinstance(value, type):
        yield from tensors_in(vars(value), depth - 1)


@check
def inputs_and_graph(case: Case) -> None:
    """Inputs stay as they are; after the call the loss holds neither graph nor logits."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, weight = rows(loss)
        z = z.requires_grad_()
        soft = torch.softmax(z.detach()[:, :C], 1)
        for target in (label, soft):
            inputs = (z, target, weight)
            copies = [tensor.detach().clone() for tensor in inputs]
            versions = [tensor._version for tensor in inputs]
            loss(z, target, weight, avg_factor=2).backward()
            assert [tensor._version for tensor in inputs] == versions
            assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
            assert not [t for t in tensors_in(loss) if t.requires_grad or t.grad_fn is not None]
            copy.deepcopy(loss)
        assert not list(loss.parameters())
        logits = torch.randn_like(z).requires_grad_()
        alive = weakref.ref(logits)
        loss(logits, label, weight).backward()
        del logits
        assert alive() is None, 'the loss keeps the logits of its last call'


@check
def two_backward_passes(case: Case) -> None:
    """A retained graph may be differentiated twice."""
    loss = case.build()
    z, label, weight = rows(loss)
    for args in ((label, weight), (torch.eye(C + 1)[label][:, :C], weight)):
        x = z.clone().requires_grad_()
        value = loss(x, *args)
        first = torch.autograd.grad(value, x, retain_graph=True)[0].clone()
        torch.testing.assert_close(torch.autograd.grad(2 * value, x)[0], 2 * first)


@check
def state_outside_of_training(case: Case) -> None:
    """Only training calls with gradients and a reduction teach a loss anything."""
    for context in case.contexts:
        loss = case.build(context)
        z, label, weight = rows(loss)
        z = z.requires_grad_()
        before = state(loss)
        with torch.no_grad():
            value = loss(z, label, weight)
            assert not value.requires_grad and not torch.is_grad_enabled()
        loss(z, label, weight, reduction_override='none')
        assert loss.eval()(z, label, weight).requires_grad
        loss.get_activation(z)
        loss.get_accuracy(z, label)
        assert_same_state(state(loss), before, rtol=0)
        train(loss.train(), 1)
        saved = loss.state_dict()
        changed = [name for name in saved if not torch.equal(saved[name], before[name])]
        assert bool(changed) == case.tags.running, f'changed: {changed}'
        assert isinstance(loss, RunningStatistics) == case.tags.running


@check
def copies(case: Case) -> None:
    """Copied and pickled losses go on alike."""
    for context in case.contexts:
        loss = case.build(context)
        train(loss, 2)
        twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
        wanted = train(loss, 2, 7)
        for twin in twins:
            assert train(twin, 2, 7) == wanted
            assert_same_state(state(twin), state(loss), rtol=0)


@check
def checkpoints(case: Case) -> None:
    """A saved state resumes identically, also in a loss that was told no number of classes."""
    for context in case.contexts:
        loss = case.build(context)
        train(loss, 3)
        saved = copy.deepcopy(loss.state_dict())
        assert set(saved) >= set(loss.state_names)  # and what is not per class
        for name, value in saved.items():
            assert value.dtype == torch.float32 and torch.isfinite(value).all(), name
        unaware = case.cls(**case.kwargs)
        if context == 'roi':
            unaware.get_cls_channels(C)
        elif not loss.state_names:
            unaware = case.build(context)  # nothing in the checkpoint could tell
        wanted = train(loss, 3, 5)
        for twin in (case.build(context), unaware):
            twin.load_state_dict(saved)
            assert train(twin, 3, 5) == wanted
            assert_same_state(state(twin), state(loss), rtol=0)


@check
def steps(case: Case) -> None:
    """Calls of one optimiser step, levels or accumulated batches, add up to one step."""
    if not case.tags.running:
        return
    for context in case.contexts:
        whole, parts = case.build(context), case.build(context)
        whole.step_driven = parts.step_driven = True
        start = copy.deepcopy(parts.state_dict())
        for z, label, weight in batches(whole, 3):
            z = z.requires_grad_()
            before = {name: value.clone() for name, value in parts.state_dict().items()}
            whole(z, label, weight, avg_factor=1)
            for part in (slice(0, 4), slice(4, 4), slice(4, 11)):
                parts(z[part], label[part], weight[part], avg_factor=1)
            with torch.no_grad():
                parts(z, label, weight)  # an assigner that looks at the losses
            assert_same_state(parts.state_dict(), before, rtol=0)
            flush([whole, parts])
            assert_same_state(state(parts), state(whole))
        trained = state(parts)
        flush([parts])  # a step in which no call counted
        assert_same_state(state(parts), trained, rtol=0)
        parts.reset_running()
        assert_same_state(parts.state_dict(), start, rtol=0)


@check
def anomalies(case: Case) -> None:
    """NaN and infinity: an error that says where, or at least never a spoilt state."""
    hub = MessageHub.get_current_instance()
    known = hub.get_info('iter')
    hub.update_info('iter', 4711)
    for context in case.contexts:
        for bad in (float('nan'), float('inf')):
            for driven in (False, True):
                loss = case.build(context, detect_anomaly=True)
                z, label, weight = rows(loss)
                loss.where = 'roi_head.bbox_head.loss_cls'
                loss.step_driven = driven and case.tags.running
                train(loss, 1)
                before = state(loss)
                spoilt = z.clone()
                spoilt[3, 1], spoilt[4] = bad, bad  # a background row, a foreground row
                with pytest.raises(InputError, match=r'roi_head\.bbox_head\.loss_cls.*4711'):
                    loss(spoilt.requires_grad_(), label, weight)
                assert_same_state(state(loss), before, rtol=0)
                loss.detect_anomaly = False
                loss(spoilt, label, weight)
                train(loss, 1, 3)
                if loss.step_driven:
                    flush([loss])
                for name, value in loss.state_dict().items():
                    assert torch.isfinite(value).all(), name
                assert_same(run(loss, z, label), run(loss, z, label), rtol=0)
                assert torch.isfinite(run(loss, z, label).value)
    hub.update_info('iter', known) if known is not None else hub.runtime_info.pop('iter')


#: Operators whose result has a size or a value that the host must wait for.
WAITING = ('_local_scalar_dense', 'nonzero', 'unique', 'masked_select', 'is_nonzero', 'equal',
           'bincount', 'repeat_interleave', 'multinomial')  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Raise where a CUDA device would make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0].strip('_')
        if any(name == word.strip('_') or name.startswith('unique') for word in WAITING):
            raise AssertionError(f'{func} waits for the device')
        if name.startswith('index') and len(args) > 1 and isinstance(args[1], (list, tuple)):
            masks = [i for i in args[1] if isinstance(i, Tensor) and not i.dtype.is_signed]
            if masks:
                raise AssertionError(f'{func} with a mask waits for the device')
        if name == 'lift_fresh':
            raise AssertionError('a tensor made from Python values is a copy to the device')
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail in the block at everything that reads a tensor on the host."""

    def refuse(self, *args, **kwargs):
        raise AssertionError('a tensor is read on the host')

    words = ('tolist', 'numpy', 'cpu', '__array__', 'item')
    patches = [mock.patch.object(Tensor, word, refuse) for word in words]
    for patch in patches:
        patch.start()
    try:
        with NoWaiting():
            yield
    finally:
        for patch in patches:
            patch.stop()


@check
def no_host_sync(case: Case) -> None:
    """A training step never waits for the device."""
    for context in case.contexts:
        loss = case.build(context, num_classes=20, class_weight=2.0)
        z, label, weight = rows(loss)
        divisor, soft = torch.tensor([4.0]), torch.softmax(z[:, :20], 1)
        train(loss, 1)
        for target in (label, soft, (label, weight)):
            for rows_or_entries in (None, weight, weight[:, None].repeat(1, z.shape[1])):
                x = z.clone().requires_grad_()
                with no_waiting():
                    loss(x, target, rows_or_entries, avg_factor=divisor).backward()
        with no_waiting():
            loss(z.clone().requires_grad_(), label, reduction_override='none').sum().backward()
            if case.tags.running:
                flush([loss])
