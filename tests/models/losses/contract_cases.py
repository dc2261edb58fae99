"""What the contract suite runs on: every registered loss with each of its sets of arguments.

A check is a function of one :class:`Case` that asserts; :func:`check` puts it in ``CHECKS``. A new
loss needs no entry anywhere: it is found in the registry and tells its facts by ``tags``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmdet_lt import ClassStatistics
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.losses.tags import LossTags
from mmdet_lt.registration import register_all
from mmdet_lt.registry import MODELS

register_all()

#: Classes of most checks.
C = 5
CHECKS: dict[str, Callable[[Case], None]] = {}


def check(function: Callable[[Case], None]) -> Callable[[Case], None]:
    """Make ``function`` part of the contract."""
    CHECKS[function.__name__] = function
    return function


@dataclass(frozen=True)
class Case:
    """One loss with one set of arguments."""

    cls: type[LongTailLoss]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f'{key}={value}' for key, value in self.kwargs.items()]
        return '-'.join([self.cls.__name__, *words])

    @functools.cached_property
    def tags(self) -> LossTags:
        """Those of an instance: arguments may change them."""
        return self.cls(**self.kwargs).tags

    @functools.cached_property
    def contexts(self) -> tuple[str, ...]:
        """Kinds of heads the loss is for."""
        dense = self.cls(**self.kwargs).dense_columns(C) is not None
        return ('roi', 'dense') if dense else ('roi',)

    def build(self, context: str = 'roi', num_classes: int = C, **kwargs: Any) -> LongTailLoss:
        """The loss as a head and the hook leave it before training."""
        loss = self.cls(**{'num_classes': num_classes, **self.kwargs, **kwargs})
        if context == 'roi':
            loss.get_cls_channels(num_classes)
        if self.tags.statistics:
            loss.set_class_statistics(statistics(num_classes))
        return loss


def registered_losses() -> list[type[LongTailLoss]]:
    """Every loss of the registry that keeps the contract, by name."""
    classes = {cls for cls in MODELS.module_dict.values() if isinstance(cls, type)}
    found = [cls for cls in classes if issubclass(cls, LongTailLoss)]
    return sorted(found, key=lambda cls: cls.__name__)


def cases_of(cls: type[LongTailLoss]) -> list[Case]:
    """A loss with its default arguments and with each of its variants."""
    return [Case(cls, kwargs) for kwargs in ({}, *cls.tags.variants)]


@functools.lru_cache
def statistics(num_classes: int) -> ClassStatistics:
    """A long tail: from 3,000 images down to 3, every seventh class never seen."""
    counts = [max(3000 // (rank + 1), 3) * (rank % 7 != 6) for rank in range(num_classes)]
    names = [f'class {rank}' for rank in range(num_classes)]
    return ClassStatistics(names, counts, [count * 2 for count in counts], 20_000)


def width(loss: LongTailLoss) -> int:
    """Columns of logits in the context of the loss."""
    if loss.context == 'roi':
        return loss.get_cls_channels(loss.num_classes)
    return loss.dense_columns(loss.num_classes)


def rows(
    loss: LongTailLoss, number: int = 12, seed: int = 0, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels (every third background) and weights of ``number`` rows."""
    random = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(number, width(loss), generator=random)
    label = torch.randint(0, loss.num_classes, (number,), generator=random)
    label[::3] = loss.num_classes
    return z, label, 0.25 + torch.rand(number, generator=random)


def state(loss: LongTailLoss) -> dict[str, Tensor]:
    """Copies of everything the loss remembers."""
    return {name: buffer.clone() for name, buffer in loss.named_buffers()}


def set_seed(seed: int) -> None:
    """``torch.manual_seed`` for the CPU alone; that one formats three stack traces each time."""
    torch.default_generator.manual_seed(seed)


@dataclass
class Result:
    """What one call of a copy of a loss gave."""

    value: Tensor
    grad: Tensor
    state: dict[str, Tensor]


def run(loss: LongTailLoss, z: Tensor, target: Any, *args: Any, seed: int = 0, **kw: Any) -> Result:
    """Call a copy of ``loss``, so that ``loss`` stays as it is, and differentiate the sum."""
    if loss.tags.running:  # no call changes the others: `state_outside_of_training` sees to it
        loss = copy.deepcopy(loss)
    z = z.detach().clone().requires_grad_()
    set_seed(seed)
    value = loss(z, target, *args, **kw)
    (grad,) = torch.autograd.grad(value.sum(), z)
    return Result(value.detach(), grad, state(loss))


def assert_same(
    got: Result, wanted: Result, factor: float = 1.0, rtol: float = 1e-4, with_state: bool = True
) -> None:
    """``got`` is ``factor`` times ``wanted``, in value and gradient; states are equal."""
    near = dict(rtol=rtol, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(got.value, factor * wanted.value, **near)
    torch.testing.assert_close(got.grad, factor * wanted.grad, **near)
    if with_state:
        assert_same_state(got.state, wanted.state, rtol)


def assert_same_state(
    got: dict[str, Tensor], wanted: dict[str, Tensor], rtol: float = 1e-4
) -> None:
    """All buffers agree."""
    assert got.keys() == wanted.keys()
    near = dict(rtol=rtol, atol=1e-6, equal_nan=True)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, **near, msg=lambda m, n=name: f'{n}: {m}')


def assert_finite(result: Result) -> None:
    """Neither value nor gradient holds a NaN or an infinity."""
    assert torch.isfinite(result.value).all(), result.value
    assert torch.isfinite(result.grad).all(), result.grad
