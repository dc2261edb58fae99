"""The objects that may be pasted: by class, with their masks, checked before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from mmdet_lt.cam.masks import box_window
from mmdet_lt.cam.store import CAMFile
from mmdet_lt.datasets._instances import InstanceTable
from mmdet_lt.datasets.paste_request import PasteRequest
from mmdet_lt.errors import InputError
from mmdet_lt.utils.files import file_digest

MASK_SOURCES = ('cam', 'mask', 'box')
_KEY = 'train_dataloader.sampler'


class PasteBank:
    """Objects of a data set sorted by class.

    Args:
        dataset: Data set that holds the records.
        mask_source: 'cam', 'mask' or 'box'.
        cams: CAM file, needed for 'cam' only.
        checkpoint: Checkpoint the CAMs must come from, as a file or its digest; None accepts any.
        num_images: Only objects of images below this index; all by default.

    Raises:
        InputError: The CAM file is missing or does not belong to the data set or the checkpoint,
            or no object can be pasted.
    """

    def __init__(
        self,
        dataset: Any,
        mask_source: str,
        cams: str | None = None,
        checkpoint: str | None = None,
        num_images: int | None = None,
    ) -> None:
        _check_source(mask_source, cams, checkpoint)
        self.dataset = dataset
        self.mask_source = mask_source
        self.classes = tuple(dataset.metainfo['classes'])
        self.cams = None
        if mask_source == 'cam':
            self.cams = CAMFile(cams, f'{_KEY}.cams')
            check_cams(self.cams, dataset, checkpoint)
        table = InstanceTable.of(dataset, with_ids=mask_source == 'cam')
        usable = self._usable(table)
        if num_images is not None:
            usable &= table.image < num_images
        rows = np.flatnonzero(usable)
        rows = rows[np.argsort(table.label[rows], kind='stable')]
        self.image, self.position = table.image[rows], table.position[rows]
        self.label, self.id = table.label[rows], table.id[rows]
        #: Objects of each class that can be pasted, int64 (C,).
        self.counts = np.bincount(self.label, minlength=len(self.classes))
        self._starts = np.cumsum(self.counts) - self.counts
        if not len(rows):
            raise InputError(
                f'none of the {len(table)} objects of {_name(dataset)} can be pasted with '
                f"`{_KEY}.mask_source='{mask_source}'`: check the data set or use another source."
            )
        absent = [name for name, n in zip(self.classes, self.counts, strict=True) if n == 0]
        if absent:
            print_log(
                f'CAMSampler: {len(absent)} of {len(self.classes)} classes have no object to paste '
                f'and are left out of the draw: {_some(absent)}.',
                logger='current',
            )

    def _usable(self, table: InstanceTable) -> np.ndarray:
        if self.mask_source == 'box':
            return np.ones(len(table), dtype=bool)
        if self.mask_source == 'cam':
            usable, lack = self.cams.contains(table.id), 'no mask in the CAM file'
        else:
            usable, lack = table.has_mask, 'no segmentation'
            if len(table) and not usable.any():
                raise InputError(
                    f"`{_KEY}.mask_source='mask'` needs segmentations, found none in "
                    f"{_name(self.dataset)}: use mask_source='cam' or 'box'."
                )
        if not usable.all():
            print_log(
                f'CAMSampler: {np.count_nonzero(~usable)} of {len(table)} objects have {lack} and '
                'are not pasted.',
                logger='current',
            )
        return usable

    def rows(self, labels: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Rows of objects of the given classes.

        Args:
            labels: Classes with at least one object, int64 (K,).
            uniform: Which one, as numbers in [0, 1), (K,).
        """
        return self._starts[labels] + (uniform * self.counts[labels]).astype(np.int64)

    def request(self, row: int, seed: int) -> PasteRequest | None:
        """The request for one row; None if there is nothing of the object in its image."""
        info = self.dataset.get_data_info(int(self.image[row]))
        instance = info['instances'][self.position[row]]
        box = tuple(float(v) for v in instance['bbox'])
        if box_window(box, info['height'], info['width']) is None:
            return None
        mask = None
        if self.mask_source == 'cam':
            mask = self.cams.code(int(self.id[row]))
        elif self.mask_source == 'mask':
            mask = instance['mask']
        return PasteRequest(
            img_path=info['img_path'],
            height=int(info['height']),
            width=int(info['width']),
            box=box,
            label=int(self.label[row]),
            source=self.mask_source,
            mask=mask,
            seed=int(seed),
        )


def _check_source(mask_source: str, cams: str | None, checkpoint: str | None) -> None:
    if mask_source not in MASK_SOURCES:
        raise InputError(
            f'`{_KEY}.mask_source` must be one of {list(MASK_SOURCES)}, found {mask_source!r}.'
        )
    if mask_source == 'cam' and not cams:
        raise InputError(
            f"`{_KEY}.mask_source='cam'` needs `{_KEY}.cams`, a file made by "
            "tools/cam/extract_cams.py, found none: set it, or use mask_source='mask' or 'box'."
        )
    if mask_source != 'cam' and (cams or checkpoint):
        raise InputError(
            f"`{_KEY}.cams` and `checkpoint` are for mask_source='cam', found {mask_source!r}: "
            'remove them or change the source.'
        )


def check_cams(cams: CAMFile, dataset: Any, checkpoint: str | None, key: str = _KEY) -> None:
    """Refuse CAMs of other annotations, other classes or another checkpoint.

    Args:
        cams: Open CAM file.
        dataset: Data set that holds the records.
        checkpoint: Checkpoint file or its digest; None accepts any.
        key: Config key of the sampler, for errors.

    Raises:
        InputError: With both sides of the difference.
    """
    digest = file_digest(dataset.ann_file)
    if cams.header['annotation_digest'] != digest:
        raise InputError(
            f'the CAMs in {cams.path} were made for annotation file '
            f'{cams.header["annotation_file"]} (digest {cams.header["annotation_digest"]}), the '
            f'training set is {dataset.ann_file} (digest {digest}): extract them again or correct '
            f'`{key}.cams`.'
        )
    classes = tuple(dataset.metainfo['classes'])
    if cams.classes != classes:
        odd = sorted(set(cams.classes) ^ set(classes)) or ['the order of the names']
        raise InputError(
            f'the CAMs in {cams.path} are of {len(cams.classes)} classes, the training set has '
            f'{len(classes)}, and they disagree about {_some(odd)}: extract them again or correct '
            '`metainfo.classes`.'
        )
    if checkpoint is None:
        return
    found = cams.header['checkpoint_digest']
    if Path(checkpoint).is_file():
        wanted = file_digest(checkpoint)
    elif len(checkpoint) == len(found) and set(checkpoint) <= set('0123456789abcdef'):
        wanted = checkpoint
    else:
        raise InputError(
            f'`{key}.checkpoint` must be the checkpoint file the CAMs come from, or its digest; '
            f'found {checkpoint!r}, which is neither.'
        )
    if wanted != found:
        raise InputError(
            f'the CAMs in {cams.path} come from checkpoint {cams.header["checkpoint"]} (digest '
            f'{found}), `{key}.checkpoint` is {checkpoint} (digest {wanted}): extract them again '
            'with that checkpoint or correct the key.'
        )


def _name(dataset: Any) -> str:
    return str(getattr(dataset, 'ann_file', type(dataset).__name__))


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f' and {len(names) - limit} more' if len(names) > limit else ''
    return ', '.join(names[:limit]) + more
