"""Time the EQLv2 loss against MMDetection's and against dense binary cross entropy.

All losses run in this process, in turn, with the same logits and two threads; the figure is the
median of forward plus backward.

Example:
    python benchmarks/loss.py --rows 512 1024 4096
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from mmdet.models.losses import EQLV2Loss
from torch import Tensor

from mmdet_lt.models.losses.eqlv2_loss import EQLv2Loss


def providers(num_classes: int) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Name to loss of (logits (N, C + 1), labels (N,))."""
    ours = EQLv2Loss(num_classes=num_classes)
    theirs = EQLV2Loss(num_classes=num_classes)

    def dense_bce(z: Tensor, label: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, F.one_hot(label, num_classes + 1).float())

    return {
        'mmdet_lt EQLv2Loss': ours,
        'mmdet EQLV2Loss': theirs,
        'dense one-hot BCE': dense_bce,
        'softmax CE': F.cross_entropy,
    }


def step(loss: Callable, z: Tensor, label: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    z.grad = None
    start = time.perf_counter()
    loss(z, label).backward()
    return time.perf_counter() - start


def measure(rows: int, num_classes: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each provider, measured in turn."""
    torch.manual_seed(0)
    z = torch.randn(rows, num_classes + 1, requires_grad=True)
    label = torch.randint(0, num_classes + 1, (rows,))
    losses = providers(num_classes)
    times: dict[str, list[float]] = {name: [] for name in losses}
    for turn in range(repeats + 3):
        for name, loss in losses.items():
            seconds = step(loss, z, label)
            if turn >= 3:
                times[name].append(seconds)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print one row for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', type=int, nargs='+', default=[512, 1024, 4096])
    parser.add_argument('--classes', type=int, default=1203)
    parser.add_argument('--repeats', type=int, default=21)
    parser.add_argument('--out', help='append the rows to this JSON-lines file')
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for size in args.rows:
        times = measure(size, args.classes, args.repeats)
        ours = times['mmdet_lt EQLv2Loss']
        for name, value in times.items():
            rows.append(
                dict(
                    rows=size,
                    classes=args.classes,
                    loss=name,
                    ms=round(value, 3),
                    times_ours=round(value / ours, 2),
                    torch=torch.__version__,
                    machine=platform.machine(),
                    threads=2,
                )
            )
            print(
                f'{size:6d} x {args.classes}  {name:20s} {value:8.2f} ms  '
                f'{value / ours:5.2f} x ours',
                flush=True,
            )
    if args.out:
        with open(args.out, 'a', encoding='utf-8') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)


if __name__ == '__main__':
    main()
