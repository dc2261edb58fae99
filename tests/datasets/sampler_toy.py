"""Data sets of labels only, and all re-balancing samplers with arguments that suit them."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmdet.registry import DATA_SAMPLERS
from mmengine.dataset import BaseDataset

#: Every sampler of the package with arguments for :func:`long_tail`.
SAMPLERS: dict[str, dict[str, Any]] = {
    'RepeatFactorSampler': dict(repeat_thr=0.1),
    'InstanceAwareRepeatFactorSampler': dict(repeat_thr=0.1),
    'ClassBalancedSampler': dict(),
    'SquareRootSampler': dict(),
    'ProgressivelyBalancedSampler': dict(max_epochs=5),
}


class Boxes(BaseDataset):
    """Images with the given labels; a label -1 - c is a crowd box of class c.

    Records are not serialised by default: that collects garbage each time, 0.3 s in a full process.
    """

    def __init__(
        self, labels: list[list[int]], num_classes: int = 3, serialize_data: bool = False
    ) -> None:
        self.labels = labels
        super().__init__(
            metainfo=dict(classes=[f'c{i}' for i in range(num_classes)]),
            serialize_data=serialize_data,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        return [
            dict(
                img_id=1000 + index,
                instances=[
                    dict(bbox_label=c if c >= 0 else -1 - c, ignore_flag=int(c < 0)) for c in image
                ],
            )
            for index, image in enumerate(self.labels)
        ]

    def get_cat_ids(self, idx: int) -> list[int]:
        return [i['bbox_label'] for i in self.get_data_info(idx)['instances']]


def long_tail(num_images: int = 400, seed: int = 0) -> list[list[int]]:
    """Class 0 in most images, class 1 in thirty, class 2 in four, some images empty."""
    rng = np.random.default_rng(seed)
    labels = [[0] * int(rng.integers(0, 3)) for _ in range(num_images)]
    for c, number in ((1, 30), (2, 4)):
        for i in rng.choice(num_images, number, replace=False):
            labels[i].append(c)
    return labels


def build(name: str, dataset: Any, **kwargs: Any) -> Any:
    """A sampler out of the registry, with seed 0 unless told otherwise."""
    kwargs.setdefault('seed', 0)
    return DATA_SAMPLERS.build(
        dict(type=f'mmdet_lt.{name}', **kwargs), default_args=dict(dataset=dataset)
    )
