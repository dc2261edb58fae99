"""What the sampler asks of the transform: which object to paste, carried by the index itself.

Data workers are copies of the main process, made once: what a hook changes later never reaches
them. An index does. So the sampler decides, and the stream of pasted objects depends on its seed
alone, not on the number of workers, and can be deferred, skipped and resumed like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdet_lt.cam.masks import Window, box_window, decode, segmentation_mask


@dataclass(frozen=True)
class PasteRequest:
    """One object to paste.

    Args:
        img_path: Image that holds the object.
        height: Its height in pixels.
        width: Its width in pixels.
        box: The object's box, ``x1, y1, x2, y2``.
        label: Its class.
        source: Kind of ``mask``: 'cam', 'mask' or 'box'.
        mask: 'cam': (height, width, run-length code) in the window of the box; 'mask': the
            annotation's segmentation; 'box': None, the whole window is foreground.
        seed: Seed of the random transform.
    """

    img_path: str
    height: int
    width: int
    box: tuple[float, float, float, float]
    label: int
    source: str
    mask: Any
    seed: int

    def foreground(self) -> tuple[Window, np.ndarray]:
        """Window of the box in the image, and the foreground in it, bool (h, w)."""
        window = box_window(self.box, self.height, self.width)
        assert window is not None, 'the sampler leaves out boxes outside of their image'
        x0, y0, x1, y1 = window
        if self.source == 'cam':
            height, width, code = self.mask
            return window, decode(code, height, width)
        if self.source == 'mask':
            mask = segmentation_mask(self.mask, self.height, self.width)
            return window, mask[y0:y1, x0:x1]
        return window, np.ones((y1 - y0, x1 - x0), dtype=bool)


class PasteIndex(int):
    """An index into a data set that may carry a :class:`PasteRequest`.

    Data sets store the index as ``sample_idx`` in the record, where the transform finds it.
    """

    request: PasteRequest | None

    def __new__(cls, index: int, request: PasteRequest | None = None) -> PasteIndex:
        self = super().__new__(cls, index)
        self.request = request
        return self
