"""A contact sheet for a person: source images, activation maps, masks and pasted results."""

from __future__ import annotations

import copy
from pathlib import Path
from textwrap import wrap
from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdet_lt.cam.extract import box_maps
from mmdet_lt.cam.gradcam import box_cams
from mmdet_lt.cam.masks import resample, segmentation_mask
from mmdet_lt.cam.sources import build_chunks, load_detector
from mmdet_lt.datasets._paste_bank import PasteBank
from mmdet_lt.datasets.paste_request import PasteRequest
from mmdet_lt.datasets.records import unwrap_datasets
from mmdet_lt.datasets.transforms.cam_paste import CAMPaste
from mmdet_lt.errors import InputError

#: Colours of the new object, of older ones and of the annotated outline.
_NEW, _OLD, _OUTLINE = '#18c24f', '#e0a030', '#20b0ff'


def draw_sheet(
    cfg: Config,
    out: str | Path,
    cams: str | None = None,
    checkpoint: str | None = None,
    mask_source: str = 'cam',
    num: int = 12,
    pastes: int = 3,
    seed: int = 0,
) -> Path:
    """Write the sheet: one row for each object, rare classes first, one object a class.

    Args:
        cfg: Config with the training set; CAMPaste of its pipeline is used if there is one.
        out: Picture to write.
        cams: CAM file, for ``mask_source='cam'``.
        checkpoint: Where the CAMs come from; with it the activation maps are drawn, too.
        mask_source: 'cam', 'mask' or 'box'.
        num: Rows.
        pastes: Pasted results a row.
        seed: Of objects, backgrounds and transforms.

    Returns:
        The picture.

    Raises:
        InputError: CAMs, data set and checkpoint do not fit each other.
    """
    from mmdet.registry import DATASETS

    if num < 1 or pastes < 1:
        raise InputError(f'the sheet needs at least one row and one paste, found {num}, {pastes}.')
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    dataset = unwrap_datasets(DATASETS.build(cfg.train_dataloader.dataset))[0]
    # The digest of the checkpoint is looked at here, before anything is drawn.
    bank = PasteBank(dataset, mask_source, cams, checkpoint if mask_source == 'cam' else None)
    steps = dataset.pipeline.transforms
    loaders = [step for step in steps if type(step).__name__.startswith('Load')]
    paste = next((copy.copy(s) for s in steps if isinstance(s, CAMPaste)), None) or CAMPaste()
    paste.bind(loaders[0])
    rng = np.random.default_rng(seed)
    rows = _choose(bank, num, rng)
    heat = None
    if checkpoint is not None and mask_source == 'cam':
        heat = _heat_maps(cfg, checkpoint, bank, rows)
    figure = _figure(len(rows), 3 + (heat is not None) + pastes)
    for line, row in enumerate(rows):
        request = bank.request(row, int(rng.integers(2**32)))
        info = dataset.get_data_info(int(bank.image[row]))
        annotated = info['instances'][bank.position[row]].get('mask')
        axes = iter(figure.axes[line * len(figure.axes) // len(rows) :])
        image = _load(loaders, dataset, int(bank.image[row]))['img']
        count = int(bank.counts[request.label])
        title = '\n'.join(wrap(bank.classes[request.label].replace('_', ' '), 24)[:2])
        title += f'\n{count} objects'
        _draw_source(axes, image, request, annotated, None if heat is None else heat[row], title)
        for _ in range(pastes):
            background = int(rng.integers(len(dataset)))
            drawn = PasteRequest(**{**vars(request), 'seed': int(rng.integers(2**32))})
            _draw_paste(next(axes), paste.paste(_load(loaders, dataset, background), drawn))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    return out


def _choose(bank: PasteBank, num: int, rng: np.random.Generator) -> list[int]:
    """One object a class by ascending count, then more of the same until there are enough."""
    order = [c for c in np.argsort(bank.counts, kind='stable') if bank.counts[c]]
    # Half of the sheet for the rarest classes, the rest spread over the others.
    head = order[: (num + 1) // 2]
    tail = order[(num + 1) // 2 :]
    if len(tail) > num // 2 > 0:
        tail = [tail[k] for k in np.linspace(0, len(tail) - 1, num // 2).round().astype(int)]
    labels = np.asarray((head + tail) * num)[:num]
    rows = bank.rows(labels, rng.random(len(labels)))
    return [int(row) for row in dict.fromkeys(rows.tolist()) if bank.request(row, 0) is not None]


def _heat_maps(
    cfg: Config, checkpoint: str, bank: PasteBank, rows: list[int]
) -> dict[int, np.ndarray]:
    """Maps of the chosen objects, over their boxes."""
    chunks = build_chunks(cfg, 1)
    model = load_detector(cfg, checkpoint, bank.classes)
    _, compute = box_cams(model, bank.cams.header['method'])
    maps = {}
    for row in rows:
        chunk = int(np.searchsorted(chunks.images, bank.image[row]))
        images = chunks[chunk]
        found = box_maps(model, compute, images, next(model.parameters()).device)[0]
        maps[row] = found[int(np.flatnonzero(images[0]['ids'] == bank.id[row])[0])]
    return maps


def _load(loaders: list[Any], dataset: Any, index: int) -> dict[str, Any]:
    results = dataset.get_data_info(index)
    for step in loaders:
        results = step(results)
    return results


def _figure(rows: int, columns: int) -> Figure:
    figure = Figure(figsize=(1.9 * columns, 2.3 * rows), layout='constrained')
    FigureCanvasAgg(figure)
    for axis in np.ravel(figure.subplots(rows, columns, squeeze=False)):
        axis.set_axis_off()
    return figure


def _rgb(image: np.ndarray) -> np.ndarray:
    if image.ndim == 2:
        image = image[..., None].repeat(3, 2)
    return cv2.cvtColor(image.clip(0, 255).astype(np.uint8), cv2.COLOR_BGR2RGB)


def _box(axis: Any, box: Any, colour: str, width: float = 1.5) -> None:
    # Pixel (0, 0) is drawn around (0, 0), its corner lies at (-0.5, -0.5).
    corner = (box[0] - 0.5, box[1] - 0.5)
    size = (box[2] - box[0], box[3] - box[1])
    axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=width))


def _draw_source(
    axes: Any,
    image: np.ndarray,
    request: PasteRequest,
    annotated: Any,
    heat: np.ndarray | None,
    title: str,
) -> None:
    """Image with the box; then the window of the box with its map, its mask, its foreground."""
    window, mask = request.foreground()
    x0, y0, x1, y1 = window
    shown = _rgb(image)
    axis = next(axes)
    axis.imshow(shown)
    _box(axis, request.box, _NEW)
    axis.set_title(title, fontsize=8)
    crop = shown[y0:y1, x0:x1]
    if heat is not None:
        axis = next(axes)
        axis.imshow(crop)
        axis.imshow(resample(heat, request.box, window), cmap='jet', alpha=0.55)
        axis.set_title('activation', fontsize=8)
    axis = next(axes)
    axis.imshow(np.where(mask[..., None], crop, (crop * 0.25 + 160 * 0.75).astype(np.uint8)))
    if annotated is not None and request.source != 'box':
        outline = segmentation_mask(annotated, request.height, request.width)[y0:y1, x0:x1]
        if min(outline.shape) > 1 and outline.any() and not outline.all():
            axis.contour(outline, levels=[0.5], colors=_OUTLINE, linewidths=1)
    axis.set_title(f'mask ({mask.mean():.0%} of box)', fontsize=8)
    axis = next(axes)
    axis.imshow(np.where(mask[..., None], crop, np.uint8(255)))
    axis.set_title('foreground', fontsize=8)


def _draw_paste(axis: Any, results: dict[str, Any]) -> None:
    axis.imshow(_rgb(results['img']))
    boxes = results['gt_bboxes'].tensor.numpy()
    for box in boxes[:-1]:
        _box(axis, box, _OLD, 1)
    _box(axis, boxes[-1], _NEW)
    axis.set_title(f'pasted ({len(boxes)} objects)', fontsize=8)
