r"""Paste the foreground of a drawn object into an image.

Paper: Zhang, Wei, Zhou, Wu, *Bag of Tricks for Long-Tailed Visual Recognition with Deep
Convolutional Neural Networks*, AAAI 2021: foregrounds found by class activation maps are flipped,
moved, rotated and scaled over backgrounds that stay as they are.

Differs from the authors' code: a pixel belongs to the object because the mask says so, not because
it is not black; and the mask is transformed as a mask, not as grey values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from mmdet_lt.cam.masks import Window
from mmdet_lt.datasets._paste import hidden_share, tight_window, warp
from mmdet_lt.datasets.paste_request import PasteRequest
from mmdet_lt.errors import InputError
from mmdet_lt.registry import TRANSFORMS

_KEY = 'the CAMPaste transform'


@TRANSFORMS.register_module()
class CAMPaste(BaseTransform):
    """Paste the object that :class:`mmdet_lt.CAMSampler` asks for; other images pass unchanged.

    Put it directly after ``LoadAnnotations``, where image and annotations still have the
    coordinates of the file. The sampler finds it there, and lends it the pipeline's image loader.

    What changes in the record: ``img`` inside of the pasted mask, and nowhere else;
    ``gt_bboxes``, ``gt_bboxes_labels``, ``gt_ignore_flags`` get one more object; ``gt_masks``, if
    loaded, become bitmaps: one more, and the others lose the hidden pixels. Boxes of objects that
    lost pixels are drawn tightly around what is left of their mask; without masks they stay.
    Objects hidden by more than ``max_hidden`` are removed, crowds too. The raw ``instances`` stay.

    Args:
        flip_prob: Probability of mirroring left and right.
        rotation: Largest angle in degrees, drawn uniformly from both directions.
        scale: Smallest and largest factor of the size. An object larger than the image is scaled
            down to fit.
        translate: Put the object anywhere it fits, uniformly; else at its place in its own image.
        one_of: Apply one of flip, rotation with scaling, and translation, as in the paper, in place
            of all together.
        max_overlap: A place that hides more than this share of another object is drawn anew,
        tries: up to so many times; then the place that hides least is taken.
        max_hidden: Objects of which more than this share is hidden are removed.

    Raises:
        InputError: An argument is out of range, or there is no CAMSampler.
    """

    def __init__(
        self,
        flip_prob: float = 0.5,
        rotation: float = 45.0,
        scale: Sequence[float] = (0.8, 1.2),
        translate: bool = True,
        one_of: bool = False,
        max_overlap: float = 0.3,
        tries: int = 10,
        max_hidden: float = 0.7,
    ) -> None:
        _check(0 <= flip_prob <= 1, 'flip_prob', 'a probability', flip_prob)
        _check(0 <= rotation <= 180, 'rotation', 'an angle of 0 to 180 degrees', rotation)
        good = len(scale) == 2 and 0 < scale[0] <= scale[1]
        _check(good, 'scale', 'two factors (low, high) with 0 < low <= high', scale)
        _check(0 <= max_overlap <= 1, 'max_overlap', 'a share of 0 to 1', max_overlap)
        _check(0 <= max_hidden <= 1, 'max_hidden', 'a share of 0 to 1', max_hidden)
        _check(int(tries) == tries and tries >= 1, 'tries', 'a whole number of at least 1', tries)
        self.flip_prob = flip_prob
        self.rotation = rotation
        self.scale = (float(scale[0]), float(scale[1]))
        self.translate = translate
        self.one_of = one_of
        self.max_overlap = max_overlap
        self.max_hidden = max_hidden
        self.tries = int(tries)
        self.loader: Callable[[dict], dict] | None = None

    def bind(self, loader: Callable[[dict], dict]) -> None:
        """Take the transform that loads images; called by the sampler before workers start."""
        self.loader = loader

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Paste if the index of this image carries a request."""
        if self.loader is None:
            raise InputError(
                'CAMPaste pastes what a sampler asks for: expected '
                "`train_dataloader.sampler=dict(type='mmdet_lt.CAMSampler', ...)` on the same data "
                'set, found another sampler; set it or remove CAMPaste from the pipeline.'
            )
        request = getattr(results.get('sample_idx'), 'request', None)
        if request is None:
            return results
        results['sample_idx'] = int(results['sample_idx'])
        return self.paste(results, request)

    def paste(self, results: dict[str, Any], request: PasteRequest) -> dict[str, Any]:
        """Paste one object.

        Args:
            results: Record with ``img`` and annotations, in coordinates of the file.
            request: The object.
        """
        rng = np.random.default_rng(request.seed)
        window, mask = request.foreground()
        inner = tight_window(mask)
        if inner is None:  # a segmentation without a pixel in its own box
            return results
        centre = (window[0] + (inner[0] + inner[2]) / 2, window[1] + (inner[1] + inner[3]) / 2)
        image = results['img'].copy()
        crop = self._source(request, window, image)
        flip, angle, scale, move = self._draw(rng)
        crop, mask = warp(crop, mask, flip, angle, scale, image.shape[:2])
        masks = results.get('gt_masks')
        bits = None if masks is None else masks.to_ndarray().astype(np.uint8)
        areas = None if bits is None else np.count_nonzero(bits, axis=(1, 2))
        boxes = _box_array(results['gt_bboxes'])

        def share(place: Window) -> np.ndarray:
            return hidden_share(place, mask, boxes, bits, areas)

        place = self._place(rng, None if move else centre, mask.shape, image.shape, share)
        hidden = share(place)
        x0, y0, x1, y1 = place
        image[y0:y1, x0:x1][mask] = crop[mask]
        results['img'] = image
        self._update(results, place, mask, request.label, bits, boxes, hidden)
        return results

    def _source(self, request: PasteRequest, window: Window, image: np.ndarray) -> np.ndarray:
        """Pixels of the window in the source image, of the kind of the target image."""
        loaded = self.loader(dict(img_path=request.img_path))
        if loaded is None or loaded['img'].shape[:2] != (request.height, request.width):
            found = 'nothing' if loaded is None else str(loaded['img'].shape[:2])
            raise InputError(
                f'image {request.img_path} should be {request.height} x {request.width} pixels as '
                f'in the annotation file, found {found}: restore the image or mend the file.'
            )
        x0, y0, x1, y1 = window
        return loaded['img'][y0:y1, x0:x1].astype(image.dtype, copy=False)

    def _draw(self, rng: np.random.Generator) -> tuple[bool, float, float, bool]:
        flip = rng.random() < self.flip_prob
        angle = float(rng.uniform(-self.rotation, self.rotation))
        scale = float(rng.uniform(*self.scale))
        if not self.one_of:
            return flip, angle, scale, self.translate
        kinds = ['flip'] * (self.flip_prob > 0) + ['move'] * self.translate
        kinds += ['turn'] * (self.rotation > 0 or self.scale != (1.0, 1.0))
        kind = kinds[rng.integers(len(kinds))] if kinds else ''
        if kind == 'turn':
            return False, angle, scale, False
        return kind == 'flip', 0.0, 1.0, kind == 'move'

    def _place(
        self,
        rng: np.random.Generator,
        centre: tuple[float, float] | None,
        size: tuple[int, int],
        shape: Sequence[int],
        share: Callable[[Window], np.ndarray],
    ) -> Window:
        """Where an object of a size (height, width) goes: about a centre, or (None) anywhere.

        ``share`` tells how much of each other object a place hides.
        """
        height, width = size
        free_y, free_x = shape[0] - height, shape[1] - width
        if centre is not None:
            x0 = min(max(round(centre[0] - width / 2), 0), free_x)
            y0 = min(max(round(centre[1] - height / 2), 0), free_y)
            return x0, y0, x0 + width, y0 + height
        best, least = None, np.inf
        for _ in range(self.tries):
            x0, y0 = int(rng.integers(free_x + 1)), int(rng.integers(free_y + 1))
            place = (x0, y0, x0 + width, y0 + height)
            most = share(place).max(initial=0)
            if most < least:
                best, least = place, most
            if most <= self.max_overlap:
                break
        return best

    def _update(
        self,
        results: dict[str, Any],
        place: Window,
        mask: np.ndarray,
        label: int,
        bits: np.ndarray | None,
        boxes: np.ndarray,
        hidden: np.ndarray,
    ) -> None:
        """Write boxes, labels, flags and masks after the pixels were pasted."""
        x0, y0, x1, y1 = place
        keep = hidden <= self.max_hidden
        if bits is not None:
            had_pixels = bits.any((1, 2))
            bits[:, y0:y1, x0:x1][:, mask] = 0
            for k in np.flatnonzero(had_pixels & (hidden > 0)):
                rest = tight_window(bits[k])
                keep[k] &= rest is not None
                boxes[k] = rest or boxes[k]
            pasted = np.zeros((1, *results['img'].shape[:2]), dtype=np.uint8)
            pasted[0, y0:y1, x0:x1] = mask
            bits = np.concatenate([bits[keep], pasted])
            results['gt_masks'] = BitmapMasks(bits, *bits.shape[1:])
        boxes = np.concatenate([boxes[keep], np.asarray([place], dtype=boxes.dtype)])
        if isinstance(results['gt_bboxes'], np.ndarray):
            results['gt_bboxes'] = boxes
        else:
            results['gt_bboxes'] = HorizontalBoxes(torch.from_numpy(boxes))
        for name, value in (('gt_bboxes_labels', label), ('gt_ignore_flags', False)):
            old = results[name]
            results[name] = np.append(old[keep], np.asarray([value], dtype=old.dtype))


def _box_array(boxes: Any) -> np.ndarray:
    """Boxes as a float array of their own."""
    if isinstance(boxes, HorizontalBoxes):
        return boxes.tensor.numpy().copy()
    if isinstance(boxes, np.ndarray):
        return boxes.copy()
    raise InputError(
        f'{_KEY} needs upright boxes, found {type(boxes).__name__}: set `box_type="hbox"` of '
        'LoadAnnotations.'
    )


def _check(good: bool, name: str, expected: str, found: Any) -> None:
    if not good:
        raise InputError(f'`{name}` of {_KEY} must be {expected}, found {found}.')
