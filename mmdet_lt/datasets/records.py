"""Read image-level labels out of any built mmdet data set, once and as flat arrays."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from mmdet_lt.errors import InputError


def unwrap_datasets(dataset: Any) -> list[Any]:
    """The data sets that hold records, below any stack of wrappers, in order.

    Looks through ``.dataset`` (ClassBalanced, Repeat, MultiImageMix), ``.datasets`` (Concat) and
    ``._dataset`` (the slice MMEngine makes for ``num_batch_per_epoch``).
    """
    for name in ('dataset', '_dataset'):
        inner = dataset.__dict__.get(name)
        if inner is not None and hasattr(inner, '__getitem__'):
            return unwrap_datasets(inner)
    parts = dataset.__dict__.get('datasets')
    if parts is not None:
        return [leaf for part in parts for leaf in unwrap_datasets(part)]
    if not hasattr(dataset, 'get_data_info'):
        raise InputError(
            f'{type(dataset).__name__} has no `get_data_info`: statistics and samplers need an '
            'MMDetection data set.'
        )
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    return [dataset]


def dataset_labels(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """(image index, label) of every box that counts, int64 (M,) each, in data set order.

    Boxes with ``ignore_flag`` (crowds) are left out. Only the main process' records are read, no
    image and no transform.
    """
    images: list[int] = []
    labels: list[int] = []
    for index, instances in enumerate(_all_instances(dataset)):
        for instance in instances:
            if not instance.get('ignore_flag', 0):
                images.append(index)
                labels.append(instance['bbox_label'])
    return np.asarray(images, dtype=np.int64), np.asarray(labels, dtype=np.int64)


def _all_instances(dataset: Any):
    """Yield the instance list of each record, unpickling each record once."""
    if getattr(dataset, 'serialize_data', False) and hasattr(dataset, 'data_address'):
        # `get_data_info` copies and completes every record; only the raw bytes are needed here.
        ends = dataset.data_address
        data = memoryview(dataset.data_bytes)
        start = 0
        for end in ends.tolist():
            yield pickle.loads(data[start:end]).get('instances', [])
            start = end
        return
    for index in range(len(dataset)):
        yield dataset.get_data_info(index).get('instances', [])


def indexed_labels(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """(index into ``dataset``, label) of every box, through wrappers that move indices.

    Raises:
        InputError: A wrapper changes the length in a way that is not known here.
    """
    inner = dataset.__dict__.get('dataset') or dataset.__dict__.get('_dataset')
    parts = dataset.__dict__.get('datasets')
    if parts is not None:
        pairs, offset = [], 0
        for part in parts:
            index, label = indexed_labels(part)
            pairs.append((index + offset, label))
            offset += len(part)
        return tuple(np.concatenate(column) for column in zip(*pairs, strict=True))
    if inner is None or not hasattr(inner, '__getitem__'):
        return dataset_labels(unwrap_datasets(dataset)[0])
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    index, label = indexed_labels(inner)
    repeated = getattr(dataset, 'repeat_indices', None)  # ClassBalancedDataset
    if repeated is None:
        # RepeatDataset cycles through the inner set; MultiImageMixDataset and slices keep it.
        if len(dataset) > len(inner) and not hasattr(dataset, 'times'):
            raise InputError(
                f'{type(dataset).__name__} changes the length of its data set in an unknown way: '
                'put the sampler on the inner data set.'
            )
        repeated = np.arange(len(dataset)) % max(len(inner), 1)
    repeated = np.asarray(repeated, dtype=np.int64)
    order = np.argsort(index, kind='stable')
    index, label = index[order], label[order]
    start = np.searchsorted(index, repeated, side='left')
    size = np.searchsorted(index, repeated, side='right') - start
    within = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size)
    return np.repeat(np.arange(len(repeated)), size), label[np.repeat(start, size) + within]
