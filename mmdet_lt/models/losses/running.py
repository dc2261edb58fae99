"""Running statistics of a loss: float32 buffers that are equal on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over ranks where a process group exists, else the tensor itself."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # gloo reduces the memory below a strided view, not the view.
        values = values.contiguous()
        dist.all_reduce(values)
    return values


class RunningStatistics(nn.Module):
    """Mixin for losses that learn from what they have seen.

    A forward pass hands its increments to :meth:`add_increment`.

    - With ``ClassStatisticsHook`` (``step_driven``) increments wait in ``pending`` until the
      optimiser has stepped; the hook then sums them over ranks in one collective and applies
      them. So the levels of a pyramid, the stages of a cascade and accumulated batches of one
      step all see the same state, and a rank whose batch never reaches the loss cannot hang the
      others.
    - Without it every counted call is its own step.

    An increment with a NaN or an infinity in it (a step that mixed precision will skip) is dropped
    whole, and counted in ``dropped_increments``, which the hook reports.
    """

    def init_running(self) -> None:
        """Call once in the constructor."""
        self.step_driven = False
        self.register_buffer('pending', torch.zeros(0), persistent=False)
        self.register_buffer('dropped_increments', torch.zeros(()), persistent=False)

    def add_increment(self, increment: Tensor) -> None:
        """Take the increments, of one fixed shape, of one counted call of this rank."""
        increment = increment.detach().to(torch.float32)
        if not self.step_driven:
            self.apply_finite(all_reduce_sum(increment))
        elif self.pending.shape == increment.shape:
            self.pending = self.pending + increment
        else:
            self.pending = increment

    def apply_finite(self, increment: Tensor) -> None:
        """Apply a summed increment unless something in it is not finite."""
        finite = torch.isfinite(increment).all()
        self.dropped_increments = self.dropped_increments + (~finite).float()
        self.apply_increment(torch.where(finite, increment, torch.zeros_like(increment)))

    def take_pending(self, like: Tensor) -> Tensor:
        """Hand out the waiting increments, zeros of ``like``'s shape when there are none."""
        waiting = self.pending
        self.pending = waiting.new_zeros(0)
        return waiting if waiting.shape == like.shape else torch.zeros_like(like)

    def increment_like(self) -> Tensor:
        """A tensor of the shape of one increment, on the right device."""
        raise NotImplementedError

    def apply_increment(self, increment: Tensor) -> None:
        """Add increments, already summed over ranks and finite, to the buffers.

        Zeros must leave the buffers as they are. Assign new tensors: an in-place change would
        spoil a graph that still holds the old values.
        """
        raise NotImplementedError

    def reset_running(self) -> None:
        """Forget everything seen so far, for a second training stage."""
        raise NotImplementedError


def flush(losses: list[RunningStatistics]) -> None:
    """End one optimiser step: apply the waiting increments of all losses, one collective in all."""
    if not losses:
        return
    likes = [loss.increment_like() for loss in losses]
    waiting = [loss.take_pending(like) for loss, like in zip(losses, likes, strict=True)]
    total = all_reduce_sum(torch.cat([increment.flatten() for increment in waiting]))
    sizes = [like.numel() for like in likes]
    for loss, like, part in zip(losses, likes, total.split(sizes), strict=True):
        loss.apply_finite(part.view_as(like))
