"""LVIS evaluation the obvious way: loops over dicts, one pair, area and threshold at a time.

Shares no code and no data layout with the package; slow and meant to be read next to the paper.
Also makes the random data sets that the tests evaluate.
"""

from __future__ import annotations

import numpy as np
from pycocotools import mask as mask_utils

AREAS = {'': (0, 1e10), 's': (0, 1024), 'm': (1024, 9216), 'l': (9216, 1e10)}
THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)


def evaluate(data, rows, kind, max_dets=300):
    """The 13 LVIS numbers and per-category AP from a data set and official result rows."""
    _CACHE.clear()  # its keys are ids of objects, which Python reuses once those are gone
    images = {image['id']: image for image in data['images']}
    rows = _limit(rows, max_dets)
    truth = {}
    for ann in data['annotations']:
        truth.setdefault((ann['image_id'], ann['category_id']), []).append(ann)
    found = {}
    for row in rows:
        key = row['image_id'], row['category_id']
        if key in truth or key[1] in images[key[0]]['neg_category_ids']:
            found.setdefault(key, []).append(row)

    categories = sorted(data['categories'], key=lambda category: category['id'])
    ap, ar = {}, {}
    for category in categories:
        for area, limits in AREAS.items():
            for threshold in THRESHOLDS:
                key = category['id'], area, round(float(threshold), 2)
                ap[key], ar[key] = _one(
                    category['id'], limits, threshold, kind, images, truth, found
                )

    def mean(table, area='', threshold=None, group=None):
        chosen = [
            value
            for (cat, a, t), value in table.items()
            if a == area
            and threshold in (None, t)
            and value is not None
            and group in (None, next(c.get('frequency') for c in categories if c['id'] == cat))
        ]
        return sum(chosen) / len(chosen) if chosen else -1

    result = dict(AP=mean(ap), AP50=mean(ap, threshold=0.5), AP75=mean(ap, threshold=0.75))
    result.update({f'AP{a}': mean(ap, a) for a in 'sml'})
    result.update({f'AP{g}': mean(ap, group=g) for g in 'rcf'})
    result['AR'] = mean(ar)
    result.update({f'AR{a}': mean(ar, a) for a in 'sml'})
    classes = {}
    for category in categories:
        values = [ap[category['id'], '', round(float(t), 2)] for t in THRESHOLDS]
        classes[category['name']] = None if values[0] is None else sum(values) / len(values)
    return result, classes


def _limit(rows, max_dets):
    by_image = {}
    for row in rows:
        by_image.setdefault(row['image_id'], []).append(row)
    kept = []
    for image_rows in by_image.values():
        if len(image_rows) > max_dets:
            image_rows = sorted(image_rows, key=lambda row: -row['score'])[:max_dets]
        kept += image_rows
    return kept


def _one(cat, limits, threshold, kind, images, truth, found):
    """AP and recall of one category, area range and threshold; None without ground truth."""
    judged, num_gt = [], 0
    for image_id in sorted(images):
        gts = truth.get((image_id, cat), [])
        dets = sorted(found.get((image_id, cat), []), key=lambda row: -row['score'])
        skip = [bool(g.get('ignore')) or not limits[0] <= g['area'] <= limits[1] for g in gts]
        num_gt += skip.count(False)
        free = [True] * len(gts)
        for det in dets:
            best, best_iou = None, min(threshold, 1 - 1e-10)
            for wanted in (False, True):  # boxes that count first
                for i, gt in enumerate(gts):
                    if free[i] and skip[i] is wanted and _iou(det, gt, kind) >= best_iou:
                        best, best_iou = i, _iou(det, gt, kind)
                if best is not None:
                    break
            if best is not None:
                free[best] = False
                if not skip[best]:
                    judged.append((det['score'], True))
                continue
            partial = cat in images[image_id]['not_exhaustive_category_ids']
            if not partial and limits[0] <= _area(det, kind) <= limits[1]:
                judged.append((det['score'], False))
    if not num_gt:
        return None, None
    judged.sort(key=lambda item: -item[0])
    recall, precision, hits = [], [], 0
    for rank, (_, hit) in enumerate(judged, 1):
        hits += hit
        recall.append(hits / num_gt)
        precision.append(hits / rank)
    sampled = []
    for level in RECALLS:
        reached = [i for i, value in enumerate(recall) if value >= level]
        sampled.append(max(precision[reached[0] :]) if reached else 0.0)
    return sum(sampled) / len(sampled), hits / num_gt


_CACHE = {}


def _iou(det, gt, kind):
    key = id(det), id(gt), kind
    if key not in _CACHE:
        if kind == 'segm':
            a, b = (mask_utils.decode(x['segmentation']).astype(bool) for x in (det, gt))
            _CACHE[key] = (a & b).sum() / max((a | b).sum(), 1)
        else:
            (ax, ay, aw, ah), (bx, by, bw, bh) = det['bbox'], gt['bbox']
            w = min(ax + aw, bx + bw) - max(ax, bx)
            h = min(ay + ah, by + bh) - max(ay, by)
            inter = max(w, 0) * max(h, 0)
            _CACHE[key] = inter / (aw * ah + bw * bh - inter) if inter else 0.0
    return _CACHE[key]


def _area(det, kind):
    if kind == 'segm':
        return mask_utils.decode(det['segmentation']).sum()
    return det['bbox'][2] * det['bbox'][3]


def make_data(seed, num_images=25, num_categories=9, size=160):
    """An LVIS-format data set with every special case: ids unsorted and with gaps, negatives,
    incomplete images, ignored annotations, crowded scenes and categories without ground truth."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(5000)[:num_categories].tolist()
    image_ids = rng.permutation(9000)[:num_images].tolist()
    categories = [
        dict(id=c, name=f'class {c}', frequency='rcf'[i % 3], image_count=i, instance_count=2 * i)
        for i, c in enumerate(ids)
    ]
    data = dict(images=[], annotations=[], categories=categories)
    for image_id in image_ids:
        pick = rng.permutation(ids)
        positive, negative = pick[: rng.integers(0, 4)].tolist(), pick[4:6].tolist()
        partial = [c for c in positive + negative if rng.random() < 0.3]
        data['images'].append(
            dict(id=image_id, height=size, width=size, neg_category_ids=negative,
                 not_exhaustive_category_ids=partial)
        )  # fmt: skip
        for category in positive:
            if category == ids[-1]:
                continue  # the last category never occurs
            for _ in range(rng.integers(1, 6)):
                box = _random_box(rng, size)
                ann = dict(
                    id=len(data['annotations']) + 1,
                    image_id=image_id,
                    category_id=category,
                    bbox=box,
                    segmentation=_ellipse(box, size),
                )
                ann['area'] = float(mask_utils.area(ann['segmentation']))
                if rng.random() < 0.05:
                    ann['ignore'] = 1
                data['annotations'].append(ann)
    data['annotations'] = [
        data['annotations'][i] for i in rng.permutation(len(data['annotations']))
    ]
    return data


def make_samples(data, seed, noise=6.0, extra=12, decimals=2):
    """Predictions in mmdet's form; few decimals make many equal scores and some equal boxes."""
    import torch

    rng = np.random.default_rng(seed)
    size = data['images'][0]['height']
    ids = [category['id'] for category in data['categories']]
    samples = []
    for image in data['images']:
        boxes, labels, masks = [], [], []
        for ann in data['annotations']:
            if ann['image_id'] != image['id']:
                continue
            for _ in range(rng.integers(0, 4)):
                box = np.array(ann['bbox']) + rng.normal(0, noise, 4) * (rng.random() < 0.8)
                boxes.append([*box[:2], *np.maximum(box[2:], 2)])
                labels.append(ids.index(ann['category_id']))
        for _ in range(rng.integers(0, extra)):
            boxes.append(_random_box(rng, size))
            labels.append(int(rng.integers(len(ids))))
        masks = [mask_utils.decode(_ellipse(box, size)) for box in boxes]
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        samples.append(
            dict(
                img_id=image['id'],
                pred_instances=dict(
                    bboxes=boxes,
                    scores=torch.tensor(np.round(rng.random(len(labels)), decimals)).float(),
                    labels=torch.tensor(labels, dtype=torch.int64),
                    masks=torch.tensor(np.array(masks)).bool().reshape(-1, size, size),
                ),
            )
        )
    return samples


def official_rows(data, samples, kind):
    """Result rows as a user would send them to the LVIS server."""
    ids = [category['id'] for category in data['categories']]
    rows = []
    for sample in samples:
        pred = sample['pred_instances']
        for i, label in enumerate(pred['labels'].tolist()):
            row = dict(
                image_id=sample['img_id'], category_id=ids[label], score=pred['scores'][i].item()
            )
            if kind == 'segm':
                mask = np.asfortranarray(pred['masks'][i].numpy().astype(np.uint8))
                row['segmentation'] = mask_utils.encode(mask)
            else:
                x1, y1, x2, y2 = pred['bboxes'][i].tolist()
                row['bbox'] = [x1, y1, x2 - x1, y2 - y1]
            rows.append(row)
    return rows


def _random_box(rng, size):
    w, h = extent = rng.uniform(8, 0.8 * size, 2)
    return [float(v) for v in np.round([*(rng.random(2) * (size - extent)), w, h], 1)]


def _ellipse(box, size):
    x, y, w, h = box
    v, u = np.mgrid[:size, :size]
    inside = ((u - x - w / 2) / w) ** 2 + ((v - y - h / 2) / h) ** 2 <= 0.25
    rle = mask_utils.encode(np.asfortranarray(inside.astype(np.uint8)))
    return dict(size=rle['size'], counts=rle['counts'].decode())
