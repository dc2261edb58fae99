"""Predictions of a detector in a compact form that is cheap to keep, send and evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_utils

from mmdet_lt.errors import InputError
from mmdet_lt.evaluation.federated import Detections
from mmdet_lt.evaluation.ground_truth import GroundTruth

#: Masks encoded together; bounds the copy that pycocotools needs.
_MASK_CHUNK = 32


def pack_predictions(
    sample: Mapping[str, Any], metrics: Sequence[str], max_dets: int, num_classes: int | None
) -> dict[str, Any]:
    """The best ``max_dets`` predictions of one image as numpy arrays.

    Args:
        sample: ``img_id`` and ``pred_instances`` with ``bboxes`` (n, 4) as x1, y1, x2, y2 in
            pixels, ``scores`` (n,), ``labels`` (n,) and, for 'segm', ``masks`` (n, H, W) or n
            RLE dicts, and optionally ``mask_scores`` (n,).
        metrics: Subset of 'bbox' and 'segm'.
        max_dets: Kept detections; negative keeps all.
        num_classes: Number of valid labels, if known.

    Returns:
        ``img_id`` and for each metric a dict of ``scores`` and ``labels`` with ``boxes`` or with
        ``rles`` and ``areas``.

    Raises:
        InputError: A label, score, box or mask is impossible.
    """
    instances = sample.get('pred_instances')
    if 'img_id' not in sample or instances is None:
        raise InputError(
            'LVISMetric needs data samples with `img_id` and `pred_instances`, found '
            f'{sorted(sample)}: keep `img_id` in the `meta_keys` of PackDetInputs.'
        )
    image = sample['img_id']
    labels = _array(instances['labels']).astype(np.int64)
    scores = _scores(instances['scores'], image)
    if num_classes is not None and len(labels):
        bad = labels[(labels < 0) | (labels >= num_classes)]
        if len(bad):
            raise InputError(
                f'the model predicts label {bad[0]} in image {image} but the data set has '
                f'{num_classes} classes: make `num_classes` of the head and `metainfo.classes` '
                'agree.'
            )
    packed: dict[str, Any] = dict(img_id=image)
    for metric in metrics:
        ranking = scores
        if metric == 'segm' and 'mask_scores' in instances:
            ranking = _scores(instances['mask_scores'], image)
        keep = _best(ranking, max_dets)
        part = dict(scores=ranking[keep], labels=labels[keep].astype(np.int32))
        if metric == 'bbox':
            boxes = _array(instances['bboxes']).reshape(-1, 4)[keep]
            if not np.isfinite(boxes).all():
                raise InputError(f'a predicted box of image {image} is not finite: {boxes}.')
            part['boxes'] = boxes
        else:
            if 'masks' not in instances:
                raise InputError(
                    "metric 'segm' needs predicted masks but the model gives none: use "
                    "metric='bbox' or a model with a mask head."
                )
            part['rles'] = encode_masks(instances['masks'], keep)
            part['areas'] = np.asarray(mask_utils.area(part['rles']), dtype=np.float64)
        packed[metric] = part
    return packed


def encode_masks(masks: Any, keep: np.ndarray) -> list[dict]:
    """Compressed run-length code of the masks ``keep``, from (n, H, W) or from RLE dicts."""
    if isinstance(masks, (list, tuple)):
        return [masks[i] for i in keep]
    rles: list[dict] = []
    for start in range(0, len(keep), _MASK_CHUNK):
        rows = keep[start : start + _MASK_CHUNK]
        if isinstance(masks, torch.Tensor):
            part = masks[torch.from_numpy(rows).to(masks.device)].detach().cpu().numpy()
        else:
            part = np.asarray(masks)[rows]
        part = np.asfortranarray(part.transpose(1, 2, 0).astype(np.uint8))
        rles.extend(mask_utils.encode(part))
    return rles


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        # numpy knows neither bfloat16 nor, for speed, wants float16
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        return values.numpy()
    return np.asarray(values if not hasattr(values, 'tensor') else values.tensor.cpu())


def _scores(values: Any, image: Any) -> np.ndarray:
    scores = _array(values)
    if np.isnan(scores).any():
        raise InputError(f'a predicted score of image {image} is NaN: the training has diverged.')
    return scores


def _best(scores: np.ndarray, max_dets: int) -> np.ndarray:
    """Indices of the best scores; the order changes only if something is cut, as in lvis-api."""
    if max_dets < 0 or len(scores) <= max_dets:
        return np.arange(len(scores))
    return np.argsort(-scores, kind='stable')[:max_dets]


def join_predictions(
    results: Sequence[Mapping], metric: str, truth: GroundTruth, categories: np.ndarray
) -> Detections:
    """One :class:`Detections` of all images.

    Args:
        results: Outputs of :func:`pack_predictions`, one per image.
        metric: 'bbox' or 'segm'.
        truth: Ground truth that holds every image of ``results``.
        categories: Category index of each label, int64 (C,).

    Raises:
        InputError: A mask has another size than its image, or a label has no category.
    """
    index = {image_id: i for i, image_id in enumerate(truth.image_ids)}
    results = sorted(results, key=lambda result: index[result['img_id']])
    parts = [result[metric] for result in results]
    images = np.array([index[result['img_id']] for result in results], dtype=np.int64)
    labels = _concat([part['labels'] for part in parts], np.int64)
    if len(labels) and (labels.min() < 0 or labels.max() >= len(categories)):
        raise InputError(
            f'the model predicts label {labels.max()} but the data set has {len(categories)} '
            'classes: make `num_classes` of the head and `metainfo.classes` agree.'
        )
    image = np.repeat(images, [len(part['labels']) for part in parts])
    scores = _concat([part['scores'] for part in parts], np.float64)
    if metric == 'bbox':
        boxes = _concat([part['boxes'] for part in parts], np.float64).reshape(-1, 4)
        boxes[:, 2:] -= boxes[:, :2]
        return Detections(image, categories[labels], scores, boxes, boxes[:, 2] * boxes[:, 3])
    rles = [rle for part in parts for rle in part['rles']]
    areas = _concat([part['areas'] for part in parts], np.float64)
    for i, rle in zip(image, rles, strict=True):
        size = tuple(truth.image_sizes[i])
        if all(size) and tuple(rle['size']) != size:
            raise InputError(
                f'a predicted mask of image {truth.image_ids[i]} has height x width '
                f'{tuple(rle["size"])} but the annotation file says {tuple(map(int, size))}: '
                'predict masks at the original image size.'
            )
    return Detections(image, categories[labels], scores, np.empty((0, 4)), areas, rles)


def _concat(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    if not parts:
        return np.empty(0, dtype=dtype)
    return np.concatenate(parts).astype(dtype)


def to_json_rows(detections: Detections, truth: GroundTruth) -> list[dict[str, Any]]:
    """Official results format: boxes as x, y, width, height, masks as RLE without a box."""
    rows = []
    for j in range(len(detections.scores)):
        row = dict(
            image_id=truth.image_ids[detections.image[j]],
            category_id=truth.category_ids[detections.category[j]],
            score=float(detections.scores[j]),
        )
        if detections.rles is None:
            row['bbox'] = detections.boxes[j].tolist()
        else:
            rle = detections.rles[j]
            counts = rle['counts']
            counts = counts.decode() if isinstance(counts, bytes) else counts
            row['segmentation'] = dict(size=[int(v) for v in rle['size']], counts=counts)
        rows.append(row)
    return rows
