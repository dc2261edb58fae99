"""Read image-level labels out of any built mmdet data set, once and as flat arrays."""

from __future__ import annotations

import os
import os.path as osp
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

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


#: Labels of data sets that were read already. They are valid as long as the data set holds the very
#: same serialised records; `get_subset_` and the like make new ones.
_KNOWN: WeakKeyDictionary[Any, tuple[ref, np.ndarray, np.ndarray]] = WeakKeyDictionary()


def dataset_labels(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """(image index, label) of every box that counts, int64 (M,) each, in data set order.

    Boxes with ``ignore_flag`` (crowds) are left out. Only the main process' records are read, no
    image and no transform, and serialised records only once: statistics and samplers share the
    result, which is read-only.
    """
    if not _is_serialised(dataset):
        return record_labels(_all_records(dataset))
    known = _KNOWN.get(dataset)
    if known is not None and known[0]() is dataset.data_bytes:
        return known[1:]
    labels = record_labels(_all_records(dataset))
    remember_labels(dataset, dataset.data_bytes, labels)
    return labels


def record_labels(records: Iterable[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """:func:`dataset_labels` of MMDetection's records."""
    images: list[int] = []
    labels: list[int] = []
    for index, record in enumerate(records):
        for instance in record.get('instances', []):
            if not instance.get('ignore_flag', 0):
                images.append(index)
                labels.append(instance['bbox_label'])
    return np.asarray(images, dtype=np.int64), np.asarray(labels, dtype=np.int64)


def remember_labels(
    dataset: Any, data_bytes: np.ndarray, labels: tuple[np.ndarray, np.ndarray]
) -> None:
    """Note the labels that belong to the serialised records of a data set."""
    for column in labels:
        column.flags.writeable = False
    _KNOWN[dataset] = (ref(data_bytes), *labels)


def _is_serialised(dataset: Any) -> bool:
    return bool(getattr(dataset, 'serialize_data', False)) and hasattr(dataset, 'data_address')


def _all_records(dataset: Any):
    """Yield each record, unpickled once."""
    if _is_serialised(dataset):
        # `get_data_info` copies and completes every record; only the raw bytes are needed here.
        data = memoryview(dataset.data_bytes)
        start = 0
        for end in dataset.data_address.tolist():
            yield pickle.loads(data[start:end])
            start = end
        return
    for index in range(len(dataset)):
        yield dataset.get_data_info(index)


def check_images(dataset: Any) -> None:
    """Check that the image files of a data set exist, with one listing for each folder.

    Raises:
        InputError: Images are missing on the local disk.
    """
    paths = [record['img_path'] for record in _all_records(dataset) if record.get('img_path')]
    backend = (getattr(dataset, 'backend_args', None) or {}).get('backend', 'local')
    if backend == 'local':
        check_image_paths(paths, str(getattr(dataset, 'ann_file', type(dataset).__name__)))


def check_image_paths(paths: Sequence[str], source: str) -> None:
    """Like :func:`check_images`, for a list of paths."""
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        if '://' in path:
            continue
        folder, name = osp.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder or '.')) if osp.isdir(folder or '.') else set()
        if name not in listed[folder]:
            missing.append(path)
    if missing:
        raise InputError(
            f'{len(missing)} of the {len(paths)} images of {source} are not on disk, such as '
            f'{missing[0]}: correct `dataset.data_root` or `dataset.data_prefix.img`, or restore '
            'the files.'
        )


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
