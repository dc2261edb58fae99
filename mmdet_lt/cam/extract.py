"""Compute the CAM file of a training set with a trained detector."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import barrier, broadcast_object_list, get_dist_info
from mmengine.logging import print_log
from mmengine.registry import init_default_scope
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader
from tqdm import tqdm

from mmdet_lt.cam.gradcam import box_cams
from mmdet_lt.cam.masks import box_window, encode, foreground, resample
from mmdet_lt.cam.shards import Shards
from mmdet_lt.cam.sources import ImageChunks, build_chunks, load_detector, pipeline_config
from mmdet_lt.cam.store import CAMFile, Entry, write_cams
from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import file_digest

SUFFIX = '.cams'


def output_path(out: str | Path, ann_file: str | Path) -> Path:
    """The CAM file: ``out`` itself if it ends in ``.cams``, else a file in that folder."""
    out = Path(out)
    return out if out.suffix == SUFFIX else out / f'{Path(ann_file).stem}{SUFFIX}'


def chunk_cams(
    model: nn.Module, compute: Any, images: list[dict[str, Any]], threshold: float
) -> tuple[list[Entry], int]:
    """Masks of all objects of a few images, and how many maps were flat.

    Objects whose box has no pixel in the image get no mask.
    """
    device = next(model.parameters()).device
    values = box_maps(model, compute, images, device)
    entries, flat = [], 0
    for image, maps in zip(images, values, strict=True):
        for k, box in enumerate(image['boxes']):
            window = box_window(box, *image['size'])
            if window is None:
                continue
            mask, is_flat = foreground(resample(maps[k], box, window), threshold)
            flat += is_flat
            entries.append((int(image['ids'][k]), *mask.shape, encode(mask)))
    return entries, flat


def box_maps(
    model: nn.Module, compute: Any, images: list[dict[str, Any]], device: torch.device
) -> list[np.ndarray]:
    """Maps of the objects of each image, float32 (objects, h, w)."""
    data = {key: [image['data'][key] for image in images] for key in ('inputs', 'data_samples')}
    rois = []
    for index, image in enumerate(images):
        scale = image['data']['data_samples'].metainfo.get('scale_factor', (1.0, 1.0))
        boxes = image['boxes'] * np.asarray([*scale[:2], *scale[:2]])
        rois.append(np.concatenate([np.full((len(boxes), 1), index), boxes], 1))
    inputs = model.data_preprocessor(data, False)['inputs']
    labels = torch.from_numpy(np.concatenate([image['labels'] for image in images])).to(device)
    boxes = torch.from_numpy(np.concatenate(rois)).float().to(device)
    maps = compute(inputs, boxes, labels).cpu().numpy()
    return np.split(maps, np.cumsum([len(image['boxes']) for image in images])[:-1])


def extract_cams(
    cfg: Config,
    checkpoint: str,
    out: str | Path,
    batch_size: int = 8,
    threshold: float = 1.0,
    num_workers: int | None = None,
    method: str = 'gradcam',
    group: ProcessGroup | None = None,
) -> Path:
    """Write the CAM file of the training set of a config; all ranks call this together.

    Finished chunks of an earlier, killed call are kept. The result does not depend on the number of
    ranks (up to rounding at the threshold where the arithmetic differs).

    Args:
        cfg: Config with model, training set and test pipeline.
        checkpoint: Its trained weights.
        out: A ``.cams`` file, or a folder for one named after the annotation file.
        batch_size: Images that go through the detector at once.
        threshold: Foreground is what is at least this multiple of the mean of a map.
        num_workers: Processes a rank that load images; by default those of the training loader.
        method: 'gradcam' or 'hirescam', see :mod:`mmdet_lt.cam.gradcam`.
        group: Process group by which the ranks wait for each other, by default that of all.

    Returns:
        The file.

    Raises:
        InputError: Config, checkpoint and data do not fit each other, or ``out`` is in use.
    """
    if batch_size < 1 or not 0 < threshold:
        raise InputError(
            'extracting CAMs needs a batch size of at least 1 and a positive threshold, found '
            f'{batch_size} and {threshold}.'
        )
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    chunks = build_chunks(cfg, batch_size)
    path = output_path(out, chunks.dataset.ann_file)
    model = load_detector(cfg, checkpoint, tuple(chunks.dataset.metainfo['classes']))
    kind, compute = box_cams(model, method)
    shards, header = Shards(path), None
    plan: list[Any] = [None]
    rank, world_size = get_dist_info()
    if rank == 0:
        try:
            header = make_header(cfg, checkpoint, chunks, kind, threshold, method)
            done = None if _is_there(path, header) else set(shards.prepare(header))
            plan = [done if done is None else sorted(set(range(len(chunks))) - done)]
        except InputError as error:
            plan = [error]
    broadcast_object_list(plan, src=0, group=group)
    if isinstance(plan[0], InputError):
        raise plan[0]
    if plan[0] is None:
        print_log(f'{path} is complete already.', logger='current')
        return path
    pending = plan[0][rank::world_size]
    workers = cfg.train_dataloader.get('num_workers', 0) if num_workers is None else num_workers
    _work(model, compute, chunks, pending, shards, threshold, workers)
    barrier(group)
    if rank == 0:
        _merge(path, header, shards)
    barrier(group)
    return path


def make_header(
    cfg: Config,
    checkpoint: str,
    chunks: ImageChunks,
    kind: str,
    threshold: float,
    method: str,
) -> dict[str, Any]:
    """What a CAM file belongs to; a resumed extraction must have the same one."""
    settings = json.dumps([cfg.model.to_dict(), pipeline_config(cfg)], default=str, sort_keys=True)
    return dict(
        annotation_file=Path(chunks.dataset.ann_file).name,
        annotation_digest=file_digest(chunks.dataset.ann_file),
        checkpoint=Path(checkpoint).name,
        checkpoint_digest=file_digest(checkpoint),
        classes=list(chunks.dataset.metainfo['classes']),
        head=kind,
        method=method,
        threshold=threshold,
        batch_size=chunks.size,
        images=len(chunks.images),
        settings_digest=hashlib.blake2b(settings.encode(), digest_size=16).hexdigest(),
    )


def _is_there(path: Path, header: dict[str, Any]) -> bool:
    """Whether the finished file exists; another file in its place is an error."""
    if not path.exists():
        return False
    earlier = CAMFile(path, '--out').header
    odd = [key for key in header if earlier.get(key) != header[key]]
    if odd:
        raise InputError(
            f'{path} holds other CAMs already ({odd[0]} differs): remove it or choose another '
            '--out.'
        )
    return True


def _work(
    model: nn.Module,
    compute: Any,
    chunks: ImageChunks,
    pending: list[int],
    shards: Shards,
    threshold: float,
    num_workers: int,
) -> None:
    """Do this rank's chunks, with progress and remaining time of the first rank."""
    rank, _ = get_dist_info()
    loader = DataLoader(
        chunks,
        batch_size=None,
        sampler=pending,
        num_workers=num_workers,
        collate_fn=_same,
    )
    total = sum(min(chunks.size, len(chunks.images) - k * chunks.size) for k in pending)
    with tqdm(total=total, desc='CAMs', unit='img', disable=rank != 0, leave=False) as bar:
        for chunk, images in zip(pending, loader, strict=True):
            entries, flat = chunk_cams(model, compute, images, threshold)
            shards.append(rank, chunk, entries, flat)
            bar.update(len(images))
    shards.close()


def _same(value: Any) -> Any:
    return value


def _merge(path: Path, header: dict[str, Any], shards: Shards) -> None:
    """Put the parts together and remove them."""
    done = shards.prepare(header)
    counts = [0, 0]

    def entries() -> Iterator[list[Entry]]:
        for part, flat in shards.chunks(done):
            counts[0] += len(part)
            counts[1] += flat
            yield part

    write_cams(path, header, itertools.chain.from_iterable(entries()))
    shards.remove()
    print_log(
        f'{path}: {counts[0]} masks of {header["images"]} images; {counts[1]} maps were flat, '
        'there the whole box is foreground.',
        logger='current',
    )
