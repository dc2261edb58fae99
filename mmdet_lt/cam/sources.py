"""What an extraction reads: training images with their objects, and the trained detector."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.runner import load_checkpoint
from torch import nn
from torch.utils.data import Dataset

from mmdet_lt.datasets._instances import InstanceTable
from mmdet_lt.datasets.records import unwrap_datasets
from mmdet_lt.errors import InputError


class ImageChunks(Dataset):
    """Chunks of training images, prepared as for testing, with their objects.

    Args:
        dataset: Unwrapped training set.
        pipeline: Test pipeline, without annotations and without random steps.
        table: Its objects.
        size: Images a chunk.
    """

    def __init__(self, dataset: Any, pipeline: Any, table: InstanceTable, size: int) -> None:
        self.dataset, self.pipeline, self.size = dataset, pipeline, size
        self.position, self.label, self.id = table.position, table.label, table.id
        self.images, self.starts = np.unique(table.image, return_index=True)
        self.stops = np.append(self.starts[1:], len(table))

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __getitem__(self, chunk: int) -> list[dict[str, Any]]:
        rows = range(chunk * self.size, min((chunk + 1) * self.size, len(self.images)))
        return [self._image(row) for row in rows]

    def _image(self, row: int) -> dict[str, Any]:
        info = self.dataset.get_data_info(int(self.images[row]))
        own = slice(int(self.starts[row]), int(self.stops[row]))
        instances = info.pop('instances')
        boxes = [instances[k]['bbox'] for k in self.position[own]]
        path, size = info['img_path'], (info['height'], info['width'])
        data = self.pipeline(info)
        if data is None:
            raise InputError(
                f'the test pipeline gave nothing for image {path}: restore the file or set '
                '`ignore_empty=False` of its loader.'
            )
        return dict(
            data=data,
            boxes=np.asarray(boxes, dtype=np.float64),
            labels=self.label[own],
            ids=self.id[own],
            size=size,
        )


def build_chunks(cfg: Config, size: int) -> ImageChunks:
    """Training set and test pipeline of a config, ready for extraction.

    Raises:
        InputError: The config has no training set or no test pipeline, or more than one set.
    """
    from mmdet.registry import DATASETS

    for key in ('train_dataloader', 'test_dataloader'):
        if not cfg.get(key):
            raise InputError(f'extracting CAMs needs key `{key}` in the config, found none.')
    leaves = unwrap_datasets(DATASETS.build(cfg.train_dataloader.dataset))
    if len(leaves) != 1:
        raise InputError(
            f'CAMs are stored by annotation id of one file, but `train_dataloader.dataset` joins '
            f'{len(leaves)} data sets: extract each by itself, or join the annotation files.'
        )
    table = InstanceTable.of(leaves[0], with_ids=True)
    if not len(table):
        raise InputError(
            f'{leaves[0].ann_file} has no object to make a CAM of: check '
            '`train_dataloader.dataset.ann_file`.'
        )
    return ImageChunks(leaves[0], Compose(pipeline_config(cfg)), table, size)


def pipeline_config(cfg: Config) -> list[dict[str, Any]]:
    """The test pipeline without annotations; it also tells how the image was scaled."""
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset.dataset
    steps = [copy.deepcopy(dict(step)) for step in dataset.get('pipeline') or []]
    steps = [step for step in steps if 'LoadAnnotations' not in str(step['type'])]
    if not steps or 'Pack' not in str(steps[-1]['type']):
        raise InputError(
            '`test_dataloader.dataset.pipeline` must end with PackDetInputs, found '
            f'{[str(step["type"]) for step in steps]}.'
        )
    steps[-1]['meta_keys'] = ('img_path', 'ori_shape', 'img_shape', 'scale_factor')
    return steps


def load_detector(cfg: Config, checkpoint: str, classes: tuple[str, ...]) -> nn.Module:
    """The trained detector in evaluation mode, on this rank's device.

    Raises:
        InputError: The checkpoint is of another model or other classes.
    """
    from mmdet.registry import MODELS

    model = MODELS.build(cfg.model)
    content = load_checkpoint(model, checkpoint, map_location='cpu', logger='silent')
    state = content.get('state_dict', content)
    for name, value in model.named_parameters():
        found = state.get(name)
        if found is None or found.shape != value.shape:
            shape = 'none' if found is None else f'one of shape {tuple(found.shape)}'
            raise InputError(
                f'checkpoint {checkpoint} is of another model than the config: expected weight '
                f'{name} of shape {tuple(value.shape)}, found {shape}.'
            )
    trained = (content.get('meta') or {}).get('dataset_meta') or {}
    names = tuple(trained.get('classes') or trained.get('CLASSES') or classes)
    if names != classes:
        raise InputError(
            f'checkpoint {checkpoint} was trained on {len(names)} classes ({names[0]!r}, ...), the '
            f'training set of the config has {len(classes)} ({classes[0]!r}, ...): use the config '
            'it was trained with.'
        )
    return model.requires_grad_(False).eval().to(get_device())
