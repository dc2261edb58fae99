"""Rows of a detector counted by hand: its assigner called image by image."""

import torch
from mmengine.registry import DATASETS
from mmengine.structures import InstanceData
from sampling_free_toy import build
from torch.utils.data import DataLoader
from toy import toy_config


def loader_of(folder, batch_size=2, steps=()):
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    config = toy_config(folder).train_dataloader.dataset
    config.pipeline[-1:-1] = steps
    dataset = DATASETS.build(config)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=pseudo_collate)


def model_of(kind, **options):
    torch.manual_seed(0)
    model = build(kind, **options)
    model.init_weights()
    return model


def truths(model, loader):
    for item in loader.dataset:
        batch = loader.collate_fn([item])
        yield model.data_preprocessor(batch, True)


def anchors_of(head):
    """All anchors of a 64 x 64 image, in head order."""
    sizes = [(64 // s[0], 64 // s[1]) for s in head.prior_generator.strides]
    return head.prior_generator.grid_priors(sizes, device='cpu')


def add_assigned(counts, gt_inds, labels):
    """Count assignments: above 0 an object, 0 background, -1 ignored."""
    for index in gt_inds.tolist():
        if index > 0:
            counts[int(labels[index - 1])] += 1
        elif index == 0:
            counts[-1] += 1


def by_assigner(kind, model, loader):
    """Slow counts of the dense head: its assigner called by hand, image by image."""
    head = model.rpn_head if kind == 'FasterRCNN' else model.bbox_head
    counts = [0] * (head.num_classes + 1)
    for data in truths(model, loader):
        truth = data['data_samples'][0].gt_instances
        labels = truth.labels if head.num_classes > 1 else torch.zeros_like(truth.labels)
        levels = anchors_of(head)
        args = [InstanceData(priors=torch.cat(levels))]
        if kind in ('ATSS', 'GFL'):
            args.append([len(level) for level in levels])
        result = head.assigner.assign(*args, InstanceData(bboxes=truth.bboxes, labels=labels))
        add_assigned(counts, result.gt_inds, labels)
    return counts


def by_points(model, loader):
    """FCOS in plain Python: inside a box, largest side in the level's range, smallest box wins."""
    counts = [0] * 4
    for data in truths(model, loader):
        truth = data['data_samples'][0].gt_instances
        for stride, (low, high) in zip((8, 16), model.bbox_head.regress_ranges, strict=True):
            for y in range(stride // 2, 64, stride):
                for x in range(stride // 2, 64, stride):
                    best, label = float('inf'), 3
                    for (x1, y1, x2, y2), c in zip(
                        truth.bboxes.tolist(), truth.labels.tolist(), strict=True
                    ):
                        sides = (x - x1, y - y1, x2 - x, y2 - y)
                        area = (x2 - x1) * (y2 - y1)
                        if min(sides) > 0 and low <= max(sides) <= high and area < best:
                            best, label = area, c
                    counts[label] += 1
    return counts
