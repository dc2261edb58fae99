"""Run the metric the way a data loader would."""

import json

import torch

from mmdet_lt.evaluation.metrics.lvis_metric import LVISMetric


def write(path, data):
    path.write_text(json.dumps(data))
    return str(path)


def classes_of(data):
    return [category['name'] for category in data['categories']]


def run(path, data, samples, classes=None, size=None, **kwargs):
    metric = LVISMetric(path, **kwargs)
    metric.dataset_meta = dict(classes=classes_of(data) if classes is None else classes)
    for i in range(0, len(samples), 4):
        metric.process({}, samples[i : i + 4])
    return metric.evaluate(len(samples) if size is None else size), metric


def empty_sample(image_id, size=160):
    return dict(
        img_id=image_id,
        pred_instances=dict(
            bboxes=torch.zeros(0, 4),
            scores=torch.zeros(0),
            labels=torch.zeros(0, dtype=torch.int64),
            masks=torch.zeros(0, size, size, dtype=torch.bool),
        ),
    )
