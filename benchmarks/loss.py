"""Time and memory of the losses against MMDetection's and against plain PyTorch, on CPU.

All providers run in this process, in turn, on the same logits and with two threads. The time is the
median of forward plus backward; losses are called as RoI heads do, with weights and `avg_factor`.
The memory is the largest sum of what PyTorch's allocator handed out during one call, in multiples
of the logits; the gradient of the logits, 1.0, is part of it.

Example:
    python benchmarks/loss.py --rows 512 1024 4096
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    # The profiler tells of every start and stop.
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')

import torch
import torch.nn.functional as F
from mmdet.models.losses import EQLV2Loss
from mmdet.models.losses import SeesawLoss as MMDetSeesawLoss
from torch import Tensor
from torch.autograd.profiler import profile
from tqdm import tqdm

from mmdet_lt import ClassStatistics
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.models.losses.eqlv2_loss import EQLv2Loss
from mmdet_lt.models.losses.seesaw_loss import SeesawLoss
from mmdet_lt.registration import register_all
from mmdet_lt.registry import MODELS

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One loss of (logits (N, `columns`), labels (N,))."""

    name: str
    loss: Loss
    columns: int
    #: Name of the provider its time is compared with.
    against: str


def as_roi_head(loss: torch.nn.Module) -> Loss:
    """Call ``loss`` as ``BBoxHead.loss`` does."""

    def call(z: Tensor, label: Tensor) -> Tensor:
        out = loss(z, label, torch.ones(len(z)), avg_factor=float(len(z)))
        return sum(out.values()) if isinstance(out, dict) else out

    return call


def dense_bce(z: Tensor, label: Tensor) -> Tensor:
    """Plain binary cross entropy with a one-hot matrix."""
    return F.binary_cross_entropy_with_logits(z, F.one_hot(label, z.shape[1]).float())


def long_tail(num_classes: int) -> ClassStatistics:
    """Counts from 2,000 images down to 1, for losses that want them."""
    counts = [max(2000 // (rank + 1), 1) for rank in range(num_classes)]
    names = [f'class {rank}' for rank in range(num_classes)]
    return ClassStatistics(names, counts, counts, 100_000)


def registered(num_classes: int) -> list[Provider]:
    """Every loss of the registry, as an RoI head has it."""
    register_all()
    classes = {cls for cls in MODELS.module_dict.values() if isinstance(cls, type)}
    found = []
    for cls in sorted(classes, key=lambda cls: cls.__name__):
        if issubclass(cls, LongTailLoss):
            loss = cls(class_statistics=long_tail(num_classes))
            columns = loss.get_cls_channels(num_classes)
            name = f'registry {cls.__name__}'
            found.append(Provider(name, as_roi_head(loss), columns, 'softmax CE'))
    return found


def providers(num_classes: int, whole_registry: bool = False) -> list[Provider]:
    """What is measured, in this order."""
    eqlv2, seesaw = 'mmdet_lt EQLv2Loss', 'mmdet_lt SeesawLoss'
    one, two = num_classes + 1, num_classes + 2
    theirs = EQLV2Loss(num_classes=num_classes), MMDetSeesawLoss(num_classes=num_classes)
    found = [
        Provider(eqlv2, as_roi_head(EQLv2Loss(num_classes=num_classes)), one, eqlv2),
        Provider('mmdet EQLV2Loss', as_roi_head(theirs[0]), one, eqlv2),
        Provider('dense one-hot BCE', dense_bce, one, eqlv2),
        Provider('softmax CE', F.cross_entropy, one, eqlv2),
        Provider(seesaw, as_roi_head(SeesawLoss(num_classes=num_classes)), two, seesaw),
        Provider('mmdet SeesawLoss', as_roi_head(theirs[1]), two, seesaw),
    ]
    return found + (registered(num_classes) if whole_registry else [])


def step(loss: Loss, z: Tensor, label: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    z.grad = None
    start = time.perf_counter()
    loss(z, label).backward()
    return time.perf_counter() - start


def peak_memory(function: Callable[[], object]) -> int:
    """Largest sum of bytes that PyTorch's CPU allocator held beyond those before the call.

    The profiler sees every allocation of a tensor, also those inside of operators. It does not see
    buffers that a maths library allocates for itself.
    """
    gc.collect()
    with profile(profile_memory=True) as result:
        kept = function()
    del kept
    events = [e for e in result.kineto_results.events() if e.name() == '[memory]']
    current = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        largest = max(largest, current)
    return largest


def logits_and_labels(
    rows: int, columns: int, num_classes: int, foreground: float
) -> tuple[Tensor, Tensor]:
    """Random logits; labels of any class for the share `foreground`, the rest background."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(rows, columns, generator=random).requires_grad_()
    label = torch.randint(0, num_classes, (rows,), generator=random)
    background = torch.rand(rows, generator=random) >= foreground
    return z, label.masked_fill(background, num_classes)


def measure(
    rows: int, num_classes: int, found: list[Provider], repeats: int, foreground: float
) -> list[dict]:
    """Median time and peak memory of each provider, measured in turn."""
    inputs = {
        columns: logits_and_labels(rows, columns, num_classes, foreground)
        for columns in {provider.columns for provider in found}
    }
    times: dict[str, list[float]] = {provider.name: [] for provider in found}
    for turn in tqdm(range(repeats + 3), desc=f'{rows} rows', leave=False):
        for provider in found:
            seconds = step(provider.loss, *inputs[provider.columns])
            if turn >= 3:
                times[provider.name].append(seconds)
    median = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    results = []
    for provider in found:
        z, label = inputs[provider.columns]
        z.grad = None
        memory = peak_memory(functools.partial(step, provider.loss, z, label))
        results.append(
            dict(
                rows=rows,
                classes=num_classes,
                loss=provider.name,
                ms=round(median[provider.name], 3),
                times_ours=round(median[provider.name] / median[provider.against], 2),
                against=provider.against,
                fastest_ms=round(1e3 * min(times[provider.name]), 3),
                extra_memory=round(memory / z.nbytes, 2),
                foreground=foreground,
                repeats=repeats,
                torch=torch.__version__,
                machine=platform.machine(),
                threads=torch.get_num_threads(),
            )
        )
    return results


def main() -> None:
    """Measure and print one row for each size and provider."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n\n')[0])
    parser.add_argument('--rows', type=int, nargs='+', default=[512, 1024, 4096])
    parser.add_argument('--classes', type=int, default=1203)
    parser.add_argument('--repeats', type=int, default=21)
    parser.add_argument('--foreground', type=float, default=1.0, help='share of foreground rows')
    parser.add_argument('--all', action='store_true', help='every loss of the registry, too')
    parser.add_argument('--out', help='append the rows to this JSON-lines file')
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for size in args.rows:
        found = providers(args.classes, args.all)
        for row in measure(size, args.classes, found, args.repeats, args.foreground):
            rows.append(row)
            print(
                f'{size:6d} x {args.classes}  {row["loss"]:32s} {row["ms"]:9.2f} ms  '
                f'{row["times_ours"]:6.2f} x {row["against"]:20s} '
                f'memory {row["extra_memory"]:5.2f} x logits',
                flush=True,
            )
    if args.out:
        with open(args.out, 'a', encoding='utf-8') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)


if __name__ == '__main__':
    main()
