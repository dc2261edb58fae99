"""Time the extraction of class activation maps against a training step, per image.

Both run in this process, in turn, on the same images; the figure is the median over
batches. "compute" is what happens once images are in memory: forward, backward and optimiser for
training; forward, maps, resampling, thresholds and run-length codes for the extraction. "with
loading" adds reading and preparing the images by the pipeline of each.

Example:
    python benchmarks/cam.py --repeats 31
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope

from mmdet_lt.cam.extract import chunk_cams
from mmdet_lt.cam.gradcam import METHODS, box_cams
from mmdet_lt.cam.sources import build_chunks

CONFIG = 'configs/quickstart/faster-rcnn_r18_ce_random_glyph-lvis-mini.py'


def measure(cfg: Config, batch_size: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds an image of each way, without and with loading."""
    torch.manual_seed(0)
    init_default_scope(cfg.default_scope)
    chunks = build_chunks(cfg, batch_size)
    model = MODELS.build(cfg.model)
    model.init_weights()
    optimiser = build_optim_wrapper(model, cfg.optim_wrapper)
    detector = MODELS.build(cfg.model).requires_grad_(False).eval()
    detector.load_state_dict(model.state_dict())
    times: dict[str, dict[str, list[float]]] = {}

    def note(name: str, loading: float, compute: float) -> None:
        entry = times.setdefault(name, {'compute': [], 'with loading': []})
        entry['compute'].append(compute)
        entry['with loading'].append(loading + compute)

    for turn in range(repeats + 3):
        chunk = turn % (len(chunks) - 1)  # the last one may be short
        rows = range(chunk * batch_size, (chunk + 1) * batch_size)
        start = time.perf_counter()
        batch = pseudo_collate([chunks.dataset[int(chunks.images[row])] for row in rows])
        loaded = time.perf_counter()
        model.train().train_step(batch, optimiser)
        done = time.perf_counter()
        if turn >= 3:
            note('training step', loaded - start, done - loaded)
        start = time.perf_counter()
        images = chunks[chunk]
        loaded = time.perf_counter() - start
        for method in METHODS:
            start = time.perf_counter()
            chunk_cams(detector, box_cams(detector, method)[1], images, 1.0)
            if turn >= 3:
                note(f'extraction, {method}', loaded, time.perf_counter() - start)
    return {
        name: {kind: 1e3 * statistics.median(v) / batch_size for kind, v in entry.items()}
        for name, entry in times.items()
    }


def main() -> None:
    """Measure and print one row for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--config', default=CONFIG)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=31)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', help='append the rows to this JSON-lines file')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(Config.fromfile(args.config), args.batch_size, args.repeats)
    step = result['training step']
    rows = []
    for name, entry in result.items():
        for kind, value in entry.items():
            share = value / step[kind]
            print(f'{name:22s} {kind:13s} {value:7.2f} ms an image  {share:5.2f} x a step')
            rows.append(
                dict(
                    way=name,
                    kind=kind,
                    ms_per_image=round(value, 3),
                    of_step=round(share, 3),
                    config=args.config,
                    batch_size=args.batch_size,
                    torch=torch.__version__,
                    machine=platform.machine(),
                    threads=args.threads,
                )
            )
    if args.out:
        with open(args.out, 'a', encoding='utf-8') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)


if __name__ == '__main__':
    main()
