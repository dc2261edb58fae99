"""Draw many Glyph-LVIS images with several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from mmdet_lt.datasets._glyph_plan import GlyphPlan
from mmdet_lt.datasets._glyph_preset import GlyphPreset
from mmdet_lt.datasets._glyph_render import render_image
from mmdet_lt.datasets._glyph_store import (
    atomic_write,
    dump,
    image_name,
    image_record,
    shard_path,
    write_image,
)


@dataclass(frozen=True)
class Job:
    """What every process needs to draw any image of one data set."""

    out: Path
    preset: GlyphPreset
    plan: GlyphPlan
    seed: int


# (split, id of the first image, id of the last image)
Shard = tuple[str, int, int]

# Set in each worker process; sending the plan with every shard would cost more than drawing.
_job: Job | None = None


def draw_shard(job: Job, shard: Shard) -> int:
    """Draw and write the images of a shard, then its record; returns the number of images."""
    split, first, last = shard
    lines = []
    for image_id in range(first, last + 1):
        image = render_image(job.preset, job.plan, job.seed, split, image_id)
        write_image(job.out / image_name(split, image_id), image.png)
        lines.append(dump(image_record(image_id, image)))
    with atomic_write(shard_path(job.out, split, first)) as file:
        file.write('\n'.join(lines) + '\n')
    return len(lines)


def draw_shards(
    job: Job, shards: Sequence[Shard], workers: int, advance: Callable[[int], object]
) -> None:
    """Draw all shards; the result does not depend on ``workers``.

    Args:
        job: The data set.
        shards: What to draw.
        workers: Number of processes; 1 draws in this one.
        advance: Called with the number of images of each finished shard.

    Raises:
        OSError: From the first shard that could not be written; no further shard is started.
        BrokenProcessPool: A worker process was killed.
    """
    if workers == 1 or len(shards) < 2:
        for shard in shards:
            advance(draw_shard(job, shard))
        return
    # Forking spares each worker the import of the whole package; workers use no threads of BLAS.
    context = multiprocessing.get_context('fork' if sys.platform == 'linux' else 'spawn')
    pool = ProcessPoolExecutor(
        min(workers, len(shards)), context, initializer=_start, initargs=(job, os.getpid())
    )
    try:
        futures = [pool.submit(_draw, shard) for shard in shards]
        for future in as_completed(futures):
            advance(future.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _draw(shard: Shard) -> int:
    assert _job is not None
    return draw_shard(_job, shard)


def _start(job: Job, parent: int) -> None:
    global _job
    _job = job
    # Ctrl-C reaches every process of the terminal; the main one decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # A killed main process cannot tell its workers to stop, and they would wait for ever.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
