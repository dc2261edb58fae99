"""Count the rows that the classification losses of a detector receive."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mmdet_lt.errors import InputError
from mmdet_lt.models.layers.prior_state import classification_heads
from mmdet_lt.models.losses.running import all_reduce_sum
from mmdet_lt.models.task_modules.samplers.ohem_sampler import untouched_buffers


class RowCounter:
    """A forward pre-hook on ``loss_cls`` that adds up rows by class.

    Calls with ``reduction_override='none'`` search for hard rows (PAA, OHEM) and are not counted.

    Attributes:
        rows: Rows of each class with a weight above 0, float64 (C + 1,), background last.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.active = True
        self.rows = torch.zeros(num_classes + 1, dtype=torch.float64, device=device)

    def __call__(self, loss: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = ('score', 'target', 'weight', 'avg_factor', 'reduction_override')
        given = dict(zip(names, args, strict=False))
        given['weight'] = kwargs.get('weight', kwargs.get('label_weight', given.get('weight')))
        given['target'] = kwargs.get('target', kwargs.get('label', given.get('target')))
        override = kwargs.get('reduction_override', given.get('reduction_override'))
        if not self.active or override == 'none':
            return
        label = self._labels(given['target'])
        counted = torch.ones_like(label, dtype=torch.float64)
        if given['weight'] is not None:
            weight = given['weight'].reshape(len(label), -1)
            counted = (weight > 0).any(1).double()
        self.rows += torch.bincount(label, counted, minlength=self.num_classes + 1)

    def _labels(self, target: Tensor | tuple) -> Tensor:
        """Labels with everything outside ``[0, C)`` as C."""
        if isinstance(target, (tuple, list)):  # (label, quality)
            target = target[0]
        if target.dim() > 1:  # soft targets, (N, C)
            best, label = target.flatten(0, -2)[:, : self.num_classes].max(1)
            return label.masked_fill(best <= 0, self.num_classes)
        label = target.long()
        outside = (label < 0) | (label >= self.num_classes)
        return label.masked_fill(outside, self.num_classes)


def count_rows(
    model: nn.Module, loader: DataLoader, num_images: int | None = None
) -> dict[str, list[float]]:
    """Rows of each class, background last, for each classification head; summed over ranks.

    Args:
        model: A detector of type SamplingFree, on its device.
        loader: The training loader; its data set, batch size, workers and collate function count.
        num_images: Images, evenly spaced over the data set; None for all.

    Raises:
        InputError: A head received no foreground row, or none at all.
    """
    rank, world = get_dist_info()
    batches = _image_batches(len(loader.dataset), num_images, batch_size(loader))
    # Ranks take whole batches, since points in the padding of a batch count. Heads average over
    # ranks while they compute losses, so every rank makes the same number of passes; one that has
    # no batch left repeats another without counting.
    mine = batches[rank::world]
    passes = math.ceil(len(batches) / world)
    device = next(model.parameters()).device
    heads = classification_heads(model)
    with ExitStack() as stack:
        stack.enter_context(_untouched(model))
        counters = {name: RowCounter(head.num_classes, device) for name, head in heads.items()}
        for name, head in heads.items():
            handle = head.loss_cls.register_forward_pre_hook(counters[name], with_kwargs=True)
            stack.callback(handle.remove)
        loaded = _load(loader, mine or batches[:1])
        batch = None
        for turn in tqdm(
            range(passes), desc='optimal prior', unit='batch', mininterval=1, disable=rank != 0
        ):
            fresh = next(loaded, None)
            batch = batch if fresh is None else fresh
            for counter in counters.values():
                counter.active = turn < len(mine)
            _seed(batches[rank + turn * world][0] if counter.active else 0)
            data = model.data_preprocessor(batch, True)
            with torch.no_grad():
                model.plain_loss(data['inputs'], data['data_samples'])
    rows = {name: all_reduce_sum(counter.rows) for name, counter in counters.items()}
    _check(model, rows, sum(map(len, batches)))
    return {name: value.tolist() for name, value in rows.items()}


def batch_size(loader: DataLoader) -> int:
    """Images of a batch of one rank."""
    return loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)


def _image_batches(total: int, num_images: int | None, size: int) -> list[list[int]]:
    """Indices of the images, in batches that do not depend on the number of ranks."""
    wanted = min(num_images or total, total)
    indices = np.linspace(0, total - 1, wanted).round().astype(int).tolist()
    return [indices[start : start + size] for start in range(0, wanted, size)]


def _load(loader: DataLoader, batches: list[list[int]]) -> Iterator[Any]:
    return iter(
        DataLoader(
            _SeededImages(loader.dataset),
            batch_sampler=batches,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            worker_init_fn=loader.worker_init_fn,
        )
    )


class _SeededImages(Dataset):
    """A data set whose random transforms depend on the image only, not on ranks and workers."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        _seed(index)
        return self.dataset[index]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Training mode for the time being; buffers and random states are put back afterwards."""
    training = {name: module.training for name, module in model.named_modules()}
    states = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    devices = [device] if device.type == 'cuda' else []
    with torch.random.fork_rng(devices), untouched_buffers(model):
        model.train()
        try:
            yield
        finally:
            for name, module in model.named_modules():
                module.training = training.get(name, module.training)
            random.setstate(states[0])
            np.random.set_state(states[1])


def _check(model: nn.Module, rows: dict[str, Tensor], images: int) -> None:
    for name, value in rows.items():
        head = type(model.get_submodule(name)).__name__
        if not bool(value.sum() > 0):
            raise InputError(
                f'`model.{name}` ({head}) never called its `loss_cls` on {images} training images, '
                'so no prior can be measured: give `model.sampling_free.prior` as a dict.'
            )
        if not bool(value[:-1].sum() > 0):
            raise InputError(
                f'the {images} training images looked at have no object that `model.{name}` '
                f'({head}) matches, expected at least one: `train_dataloader.dataset` must hold '
                'objects (or raise `OptimalBiasHook.num_images`).'
            )
