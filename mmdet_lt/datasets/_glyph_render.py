"""Draw one Glyph-LVIS image and its annotations."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from mmdet_lt.datasets._glyph_fonts import FACES, glyph_bitmap, scaled_glyph
from mmdet_lt.datasets._glyph_plan import GlyphPlan, image_rng
from mmdet_lt.datasets._glyph_preset import GlyphPreset

# A pixel belongs to a glyph from this coverage (of 255) on, before blurring.
_INK = 100
# Limits while placing: overlap of two boxes over the smaller one, and the share of its ink that
# an instance may lose to later ones. Both are below the promised 0.3, since losing ink shrinks
# the box that the overlap is measured against afterwards.
_MAX_BOX_OVERLAP = 0.25
_MAX_INK_LOSS = 0.1
_TRIES_PER_SIZE = 12
_SHRINK = 0.85
_MIN_SIZE = 9.0
_MIN_CONTRAST = 55.0
_PAD = 4
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class RenderedImage:
    """One finished image.

    Attributes:
        png: The encoded file.
        annotations: ``[category_id, [x, y, w, h], area, RLE counts]`` of each instance; pixels.
        neg_category_ids: Ids of classes verified to be absent.
        not_exhaustive_category_ids: Ids of classes of which one instance is not annotated.
    """

    png: bytes
    annotations: list[list[Any]]
    neg_category_ids: list[int]
    not_exhaustive_category_ids: list[int]


class _CrowdedError(Exception):
    """A required instance found no place; the image is tried again with smaller glyphs."""


class _Canvas:
    """Picture, ownership of its pixels and what has been placed so far."""

    def __init__(self, background: np.ndarray) -> None:
        self.picture = background
        side = background.shape[0]
        self.owner = np.full((side, side), -1, dtype=np.int16)
        self.boxes: list[tuple[int, int, int, int]] = []
        self.ink: list[int] = []
        self.lost: list[int] = []

    def fits(self, mask: np.ndarray, x: int, y: int) -> bool:
        """Whether a glyph at this corner leaves enough of everything below it."""
        height, width = mask.shape
        for left, top, right, bottom in self.boxes:
            inter_w = min(x + width, right) - max(x, left)
            inter_h = min(y + height, bottom) - max(y, top)
            if inter_w > 0 and inter_h > 0:
                smaller = min(width * height, (right - left) * (bottom - top))
                if inter_w * inter_h >= _MAX_BOX_OVERLAP * smaller:
                    return False
        covered = self._covered(mask, x, y)
        return all(
            lost + new <= _MAX_INK_LOSS * ink
            for lost, new, ink in zip(self.lost, covered, self.ink, strict=True)
        )

    def put(self, alpha: np.ndarray, mask: np.ndarray, x: int, y: int, look: _Look) -> None:
        """Blend a glyph into the picture and make it the owner of its pixels."""
        for k, new in enumerate(self._covered(mask, x, y)):
            self.lost[k] += int(new)
        height, width = mask.shape
        self.owner[y : y + height, x : x + width][mask] = len(self.boxes)
        self.boxes.append((x, y, x + width, y + height))
        self.ink.append(int(mask.sum()))
        self.lost.append(0)

        # The blur reaches beyond the mask, so the blended window is padded and cut at the edges.
        soft = Image.fromarray(np.pad(alpha, _PAD)).filter(ImageFilter.GaussianBlur(look.blur))
        side = self.owner.shape[0]
        x0, y0 = max(x - _PAD, 0), max(y - _PAD, 0)
        x1, y1 = min(x + width + _PAD, side), min(y + height + _PAD, side)
        window = np.asarray(soft)[
            y0 - y + _PAD : y1 - y + _PAD, x0 - x + _PAD : x1 - x + _PAD, None
        ]
        share = window.astype(np.float32) * np.float32(look.opacity / 255)
        below = self.picture[y0:y1, x0:x1]
        # Blurred hairlines may stay below 0.4 everywhere.
        inside = share[..., 0] > min(0.4, 0.5 * float(share.max()))
        colour = look.colour(below[inside].mean(0))
        below += (colour - below) * share

    def _covered(self, mask: np.ndarray, x: int, y: int) -> np.ndarray:
        window = self.owner[y : y + mask.shape[0], x : x + mask.shape[1]][mask]
        return np.bincount(window[window >= 0], minlength=len(self.boxes))


class _Look:
    """Random colour, opacity and blur of one instance."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.candidates = rng.uniform(0, 255, (8, 3)).astype(np.float32)
        self.opacity = float(rng.uniform(0.85, 1.0))
        self.blur = float(rng.uniform(0.2, 0.9))

    def colour(self, below: np.ndarray) -> np.ndarray:
        """The first candidate that stands out from the mean colour below it; (3,) float32."""
        for candidate in self.candidates:
            if abs(float((candidate - below) @ _LUMA)) >= _MIN_CONTRAST:
                return candidate
        return np.full(3, 0 if float(below @ _LUMA) > 127 else 255, dtype=np.float32)


def render_image(
    preset: GlyphPreset, plan: GlyphPlan, seed: int, split: str, image_id: int
) -> RenderedImage:
    """Draw one image; a pure function of its arguments.

    Every class of the image's plan is drawn at least once. Category ids are class indices + 1.
    """
    rng = image_rng(seed, split, image_id)
    classes = plan.splits[split].classes_of(image_id)
    absent = np.setdiff1d(np.arange(len(plan.characters)), classes)
    num_negative = round(preset.negative_fraction * len(absent))
    negative = np.sort(rng.choice(absent, num_negative, replace=False))

    order = rng.permutation(classes).tolist()
    repeats = [c for c in order for _ in range(int(rng.geometric(1 - preset.repeat_chance)) - 1)]
    repeats = repeats[: max(preset.max_instances - len(order), 0)]
    unannotated = -1
    frequent = classes[plan.frequent[classes]]
    if len(frequent) and rng.random() < preset.not_exhaustive_rate:
        unannotated = int(rng.choice(frequent))

    background = _background(preset.image_size, rng)
    scale = 1.0
    while True:
        canvas = _Canvas(background.copy())
        try:
            for c in order:
                _place(canvas, preset, plan.characters[c], rng, scale, required=True)
        except _CrowdedError:
            scale *= _SHRINK
            continue
        break
    drawn = list(order)
    for c in repeats:
        if _place(canvas, preset, plan.characters[c], rng, scale, required=False):
            drawn.append(c)
    if unannotated >= 0:
        character = plan.characters[unannotated]
        if not _place(canvas, preset, character, rng, scale, required=False):
            unannotated = -1
    return RenderedImage(
        png=_encode_png(canvas.picture),
        annotations=_annotations(canvas.owner, drawn),
        neg_category_ids=(negative + 1).tolist(),
        not_exhaustive_category_ids=[unannotated + 1] if unannotated >= 0 else [],
    )


def _place(
    canvas: _Canvas,
    preset: GlyphPreset,
    character: str,
    rng: np.random.Generator,
    scale: float,
    required: bool,
) -> bool:
    """Draw one instance at a free place; required ones shrink until they fit.

    Returns:
        False when an instance that is not required found no place.

    Raises:
        _CrowdedError: A required instance found no place at any size.
    """
    low, high = (max(v * scale, _MIN_SIZE) for v in preset.glyph_size)
    size = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    bitmap = glyph_bitmap(character, int(rng.integers(len(FACES))))
    aspect = float(rng.uniform(0.88, 1.14))
    angle = float(rng.uniform(-preset.max_rotation, preset.max_rotation))
    look = _Look(rng)
    while size >= _MIN_SIZE * 0.9:
        alpha = np.asarray(scaled_glyph(bitmap, size, aspect, angle))
        alpha, mask = _cut_to_ink(alpha)
        spare = [preset.image_size - side for side in mask.shape]
        for _ in range(_TRIES_PER_SIZE if min(spare) >= 0 else 0):
            y, x = (int(rng.integers(s + 1)) for s in spare)
            if canvas.fits(mask, x, y):
                canvas.put(alpha, mask, x, y, look)
                return True
        if not required:
            return False
        size *= _SHRINK
    raise _CrowdedError


def _cut_to_ink(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut to the tight box of the mask; a very thin glyph uses half of its peak as the limit."""
    mask = alpha >= min(_INK, max(int(alpha.max()) // 2, 1))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return alpha[window], mask[window]


def _annotations(owner: np.ndarray, drawn: list[int]) -> list[list[Any]]:
    """Visible masks as RLE, with their tight boxes; ``drawn[k]`` is the class of owner ``k``."""
    from pycocotools import mask as rle

    if not drawn:
        return []
    stack = owner[..., None] == np.arange(len(drawn), dtype=np.int16)
    coded = rle.encode(np.asfortranarray(stack, dtype=np.uint8))
    boxes, areas = rle.toBbox(coded).tolist(), rle.area(coded).tolist()
    return [
        [c + 1, box, float(area), code['counts'].decode('ascii')]
        for c, box, area, code in zip(drawn, boxes, areas, coded, strict=True)
    ]


def _background(side: int, rng: np.random.Generator) -> np.ndarray:
    """Colour gradient with soft grey noise and a few strokes; (side, side, 3) float32."""
    base = rng.uniform(30, 225, 3)
    corners = np.clip(base + rng.uniform(-55, 55, (2, 2, 3)), 0, 255).astype(np.float32)
    t = np.linspace(0, 1, side, dtype=np.float32)
    blend = np.stack([1 - t, t])
    picture = np.einsum('iy,jx,ijc->yxc', blend, blend, corners)
    cells = int(rng.integers(6, side // 4))
    noise = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    noise = noise.resize((side, side), Image.Resampling.BICUBIC)
    picture += np.float32(rng.uniform(3, 14)) * np.asarray(noise)[..., None]

    image = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 4 + side // 64))):
        shape, width = int(rng.integers(3)), int(rng.integers(1, 4))
        colour = tuple(rng.integers(0, 256, 3).tolist())
        x, y = rng.uniform(0, side, 2).tolist()
        dx, dy = rng.uniform(-side / 3, side / 3, 2).tolist()
        start = float(rng.uniform(0, 360))
        if shape == 0:
            pen.line((x, y, x + dx, y + dy), colour, width)
            continue
        box = (min(x, x + dx), min(y, y + dy), max(x, x + dx), max(y, y + dy))
        # Flat arcs only: rounder ones would look like glyphs (c, u, o).
        pen.arc(box, start, start + float(rng.uniform(30, 90)), colour, width)
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.0))))
    return np.asarray(image).astype(np.float32)


def _encode_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    pixels = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, format='PNG', compress_level=4)
    return buffer.getvalue()
