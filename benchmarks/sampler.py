"""Time the repeat factors of the samplers against MMEngine's ClassBalancedDataset.

Both work on the same data set of LVIS's size, made up in memory: 100,000 images, 1.27 million boxes
with polygons, 1,203 classes with a long tail. The time starts once the annotations are parsed, that
is, when the data set is built and its records are serialised.

- ``LVISDataset``: the labels were noted while the annotations were parsed; what that costs has a
  row of its own.
- ``any data set``: MMDetection's own data sets; the records are unpickled once.

Example:
    python benchmarks/sampler.py --out benchmarks/results/sampler.jsonl
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
from typing import Any

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from mmengine.dataset import ClassBalancedDataset
from tqdm import tqdm

import mmdet_lt  # noqa: F401  registers the package
from mmdet_lt.datasets import records
from mmdet_lt.datasets.lvis_dataset import LVISDataset
from mmdet_lt.registry import DATA_SAMPLERS

THRESHOLD = 1e-3
PEER = 'mmengine ClassBalancedDataset'


class MadeUp(LVISDataset):
    """LVISDataset with records out of a generator in place of a file."""

    def __init__(self, images: int, boxes: int, classes: int, points: int) -> None:
        self.size = images, boxes, classes, points
        names = [f'class {c}' for c in range(classes)]
        super().__init__(metainfo=dict(classes=names), pipeline=[], filter_cfg=None)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Boxes at random in images, classes by a Zipf law, ``points`` numbers in a polygon."""
        images, boxes, classes, points = self.size
        rng = np.random.default_rng(0)
        shares = 1 / np.arange(1, classes + 1) ** 1.3
        label = rng.choice(classes, boxes, p=shares / shares.sum())
        ends = np.searchsorted(np.sort(rng.integers(0, images, boxes)), np.arange(images), 'right')
        polygons = rng.random((997, points)).round(2) * 640
        data, start = [], 0
        for index, end in enumerate(tqdm(ends.tolist(), desc='making records')):
            instances = [
                dict(
                    ignore_flag=0,
                    bbox=[1.5, 2.5, 30.25, 40.75],
                    bbox_label=int(label[k]),
                    mask=[polygons[k % 997].tolist()],
                )
                for k in range(start, end)
            ]
            data.append(dict(img_id=index, height=480, width=640, instances=instances))
            start = end
        self.noting = seconds(lambda: records.record_labels(data))
        return data


def seconds(task: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def build(name: str, dataset: MadeUp, keep_labels: bool) -> Any:
    """A sampler, on labels that were noted while parsing, or on records to be read first."""
    if not keep_labels:
        records._KNOWN.clear()
    config = dict(type=f'mmdet_lt.{name}', seed=0)
    if name == 'ProgressivelyBalancedSampler':
        config['max_epochs'] = 12
    return DATA_SAMPLERS.build(config, default_args=dict(dataset=dataset))


def providers(dataset: MadeUp) -> dict[str, Callable[[], Any]]:
    """Name to computation; ours first."""
    names = [
        'RepeatFactorSampler',
        'InstanceAwareRepeatFactorSampler',
        'ClassBalancedSampler',
        'SquareRootSampler',
        'ProgressivelyBalancedSampler',
    ]
    tasks: dict[str, Callable[[], Any]] = {
        f'mmdet_lt {name}, LVISDataset': lambda name=name: build(name, dataset, True)
        for name in names
    }
    tasks['mmdet_lt RepeatFactorSampler, any data set'] = lambda: build(names[0], dataset, False)
    tasks[PEER] = lambda: ClassBalancedDataset(dataset, THRESHOLD)
    return tasks


def main() -> None:
    """Measure, print one line for each provider, and the time of drawing an epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--images', type=int, default=100_000)
    parser.add_argument('--boxes', type=int, default=1_270_000)
    parser.add_argument('--classes', type=int, default=1203)
    parser.add_argument('--points', type=int, default=40, help='numbers in a polygon; 0 for none')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--out', help='append the rows to this JSON-lines file')
    args = parser.parse_args()
    dataset = MadeUp(args.images, args.boxes, args.classes, args.points)
    labels = records.dataset_labels(dataset)
    times: dict[str, list[float]] = {name: [] for name in providers(dataset)}
    for _ in tqdm(range(args.repeats), desc='measuring'):
        for name, task in providers(dataset).items():
            records.remember_labels(dataset, dataset.data_bytes, labels)
            times[name].append(seconds(task))
    records.remember_labels(dataset, dataset.data_bytes, labels)
    sampler = build('RepeatFactorSampler', dataset, True)
    times['mmdet_lt RepeatFactorSampler, one epoch drawn'] = [
        seconds(lambda: list(sampler)) for _ in range(args.repeats)
    ]
    times['mmdet_lt LVISDataset, labels noted while parsing'] = [dataset.noting]
    peer = statistics.median(times[PEER])
    size = dict(images=args.images, boxes=args.boxes, classes=args.classes, points=args.points)
    rows = []
    for name, values in times.items():
        middle = statistics.median(values)
        ratio = peer / middle
        print(f'{name:62s} {middle:8.3f} s   {ratio:7.1f} x faster than {PEER}', flush=True)
        rows.append(
            dict(
                size,
                provider=name,
                seconds=round(middle, 4),
                times_faster=round(ratio, 1),
                numpy=np.__version__,
                machine=platform.machine(),
            )
        )
    if args.out:
        with open(args.out, 'a', encoding='utf-8') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)


if __name__ == '__main__':
    main()
