"""Where a training iteration lies in the stream of the sampler."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader


def loader_sampler(loader: DataLoader) -> Any:
    """The sampler that decides the order of a data loader, below any batch sampler."""
    batches = loader.batch_sampler
    return loader.sampler if batches is None else getattr(batches, 'sampler', loader.sampler)


def samples_before(loader: DataLoader, iteration: int) -> int:
    """Samples of this rank that the batches before an iteration (from 0) take from the sampler.

    Counted in the stream of whole epochs: samples that an incomplete last batch or ``drop_last``
    leaves out of an epoch count as taken. Batch samplers that group images (by aspect ratio) draw a
    few samples ahead; for them the number is that of a plain batch sampler.
    """
    epochs, batches = divmod(iteration, max(len(loader), 1))
    size = getattr(loader.batch_sampler, 'batch_size', None) or loader.batch_size or 1
    return epochs * len(loader_sampler(loader)) + batches * size
