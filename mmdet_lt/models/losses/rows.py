"""The rows of one call of a loss: targets and weights in one form, whatever the head passed.

Letters: ``N`` rows, ``C`` foreground classes, ``K`` columns of logits. Background label: ``C``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdet_lt.errors import InputError
from mmdet_lt.ops.sigmoid import compute_dtype


def one_hot(label: Tensor, num_columns: int, dtype: torch.dtype) -> Tensor:
    """(N, K) one-hot rows; labels outside ``[0, K)`` give zero rows."""
    inside = (label >= 0) & (label < num_columns)
    target = torch.zeros(len(label), num_columns, dtype=dtype, device=label.device)
    return target.scatter_(1, label.clamp(0, num_columns - 1)[:, None], inside[:, None].to(dtype))


def fit_columns(vector: Tensor, num_columns: int, background: float) -> Tensor:
    """(K,) from a vector per class, (C,), by appending the value of a background column.

    A vector that holds more than K entries, background last, is cut.
    """
    missing = num_columns - len(vector)
    if missing <= 0:
        return vector[:num_columns]
    return torch.cat([vector, vector.new_full((missing,), background)])


@dataclass
class Rows:
    """One call of a loss.

    Attributes:
        z: Logits as they came, (N, K).
        label: Class of each row, C for background, int64 (N,).
        num_classes: C.
        soft: Soft targets of the classes, (N, C), or None where labels say all.
        background: Soft target of background, (N,), where the head gave one.
        weight: (N,), (N, K) or None; detached, in computing precision.
        divisor: What the sum is divided by.
        count: Whether running statistics learn from this call.
        per_entry: ``reduction='none'``.
    """

    z: Tensor
    label: Tensor
    num_classes: int
    soft: Tensor | None
    background: Tensor | None
    weight: Tensor | None
    divisor: Tensor | float
    count: bool
    per_entry: bool

    @property
    def is_fg(self) -> Tensor:
        """Foreground rows, bool (N,)."""
        return self.label < self.num_classes

    @property
    def plain(self) -> bool:
        """Integer labels and at most one weight a row."""
        return self.soft is None and (self.weight is None or self.weight.dim() == 1)

    @property
    def row_weight(self) -> Tensor | None:
        """Weight of each row, (N,); of a weight (N, K) the largest of the row."""
        if self.weight is None or self.weight.dim() == 1:
            return self.weight
        return self.weight.max(1).values

    @property
    def entry_weight(self) -> Tensor | None:
        """Weight broadcastable to (N, K)."""
        if self.weight is None or self.weight.dim() == 2:
            return self.weight
        return self.weight[:, None]

    def target(self, distribution: bool) -> Tensor:
        """Target of every column, (N, K).

        Where there is a column for background, its target is the one the head gave; else what the
        classes leave over: ``1 - sum`` for a ``distribution``, ``1 - max`` for sigmoid columns.
        """
        dtype, num_columns = compute_dtype(self.z), self.z.shape[1]
        if self.soft is None:
            return one_hot(self.label, num_columns, dtype)
        if num_columns == self.num_classes:
            return self.soft
        rest = self.background
        if rest is None:
            rest = 1 - (self.soft.sum(1) if distribution else self.soft.max(1).values)
        return torch.cat([self.soft, rest.clamp_min(0)[:, None]], 1)


def split_target(
    name: str, z: Tensor, target: Any, num_classes: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(label, soft, background)`` of a target in any of its forms.

    Raises:
        InputError: The form is none of labels (N,), soft (N, C) or (N, C + 1), (label, quality).
    """
    rows, quality = len(z), None
    if isinstance(target, (tuple, list)) and len(target) == 2:
        target, quality = target
    if not isinstance(target, Tensor) or target.dim() == 0 or len(target) != rows:
        found = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise InputError(f'{name} got {rows} rows of logits and the target {found}.')
    dtype = compute_dtype(z)
    if target.dim() == 1 and not target.is_floating_point() and target.dtype != torch.bool:
        label = target.long()
        label = label.masked_fill((label < 0) | (label > num_classes), num_classes)
        if quality is None:
            return label, None, None
        if not isinstance(quality, Tensor) or quality.shape != target.shape:
            found = tuple(quality.shape) if isinstance(quality, Tensor) else type(quality).__name__
            raise InputError(f'{name} got {rows} labels and the quality {found}.')
        soft = one_hot(label, num_classes, dtype) * quality.detach().to(dtype)[:, None]
        return label, soft, None
    if quality is None and target.shape in ((rows, num_classes), (rows, num_classes + 1)):
        matrix = target.detach().to(dtype)
        soft = matrix[:, :num_classes]
        best, label = soft.max(1)
        label = label.masked_fill(best <= 0, num_classes)
        return label, soft, matrix[:, num_classes] if matrix.shape[1] > num_classes else None
    raise InputError(
        f'{name} takes labels ({rows},) int, soft targets ({rows}, {num_classes}) or '
        f'(label, quality), found {tuple(target.shape)} of {target.dtype}.'
    )


def align_weight(name: str, z: Tensor, weight: Tensor | None, num_classes: int) -> Tensor | None:
    """``weight`` as (N,) or (N, K) in computing precision.

    A weight (N, C) beside more than C columns says nothing about the others: they take the
    largest weight of their row, so that an ignored row stays ignored.
    """
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or weight.shape not in (
        (len(z),),
        tuple(z.shape),
        (len(z), num_classes),
    ):
        found = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise InputError(
            f'`weight` of {name} must have shape ({len(z)},) or {tuple(z.shape)}, found {found}.'
        )
    weight = weight.detach().to(compute_dtype(z))
    missing = z.shape[1] - weight.shape[-1]
    if weight.dim() == 2 and missing:
        rest = weight.max(1, keepdim=True).values if weight.shape[0] else weight[:, :1]
        weight = torch.cat([weight, rest.expand(-1, missing)], 1)
    return weight


def loss_divisor(avg_factor: Any, reduction: str, rows: int, dtype: torch.dtype) -> Tensor | float:
    """What a 'mean' divides by: ``avg_factor`` in any of its forms, by default the rows.

    0 counts as 1, since a batch without positives must give a finite loss.
    """
    if reduction == 'sum' and avg_factor is not None:
        raise ValueError("avg_factor cannot be used with reduction='sum': it divides a mean.")
    if reduction != 'mean':
        return 1.0
    if avg_factor is None:
        return float(max(rows, 1))
    if isinstance(avg_factor, Tensor):
        avg_factor = avg_factor.detach().reshape(()).to(dtype)
        return torch.where(avg_factor > 0, avg_factor, torch.ones_like(avg_factor))
    return float(avg_factor) if avg_factor > 0 else 1.0
