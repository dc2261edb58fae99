"""Plan of a Glyph-LVIS data set: which glyph is which class, and which image shows which classes.

Nothing here draws an image of the data set. The plan follows from the preset and the seed alone,
so that images can be drawn in any order and by any number of processes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mmdet_lt.datasets._glyph_fonts import common_characters, glyph_bitmap, glyph_signature
from mmdet_lt.datasets._glyph_preset import COMMON_MAX_IMAGES, RARE_MAX_IMAGES, GlyphPreset
from mmdet_lt.errors import InputError

# First word after the seed of each random stream; the streams stay independent of each other.
STREAM_IMAGES, STREAM_GLYPHS, STREAM_COUNTS, STREAM_LAYOUT = range(4)
SPLITS = ('train', 'val')

# Two instances may differ by a rotation, so classes are compared over these angles (degrees).
_ANGLES = (-45, -30, -15, 0, 15, 30, 45)
_SIMILARITY_STEP = 0.01
# Arcs look like the strokes in the background, the others like each other.
_LEFT_OUT_NAMES = ('BRAILLE', 'BOX DRAWINGS', 'BLOCK', 'CIRCULAR ARC', 'HALF CIRCLE')


@dataclass(frozen=True)
class SplitPlan:
    """Which classes each image of one split shows.

    Attributes:
        offsets: (N + 1,) int64; the classes of image ``i`` (counted from 0) are
            ``classes[offsets[i]:offsets[i + 1]]``.
        classes: (P,) int64 class indices in 0..C-1, distinct and rising within an image.
    """

    offsets: np.ndarray
    classes: np.ndarray

    def classes_of(self, image_id: int) -> np.ndarray:
        """Class indices of the image with this id (ids start at 1)."""
        return self.classes[self.offsets[image_id - 1] : self.offsets[image_id]]


@dataclass(frozen=True)
class GlyphPlan:
    """Glyphs, class counts and image contents of a whole data set.

    Attributes:
        characters: One character per class, rising by code point.
        counts: Images per class and split, (C,) int64 each.
        splits: Contents of the images of each split.
    """

    characters: tuple[str, ...]
    counts: dict[str, np.ndarray]
    splits: dict[str, SplitPlan]

    @property
    def frequent(self) -> np.ndarray:
        """(C,) bool: classes in more than 100 training images."""
        return self.counts['train'] > COMMON_MAX_IMAGES


def frequency_group(image_count: int) -> str:
    """LVIS letter of a class: 'r' up to 10 training images, 'c' up to 100, else 'f'."""
    if image_count <= RARE_MAX_IMAGES:
        return 'r'
    return 'c' if image_count <= COMMON_MAX_IMAGES else 'f'


def plan_class_counts(preset: GlyphPreset, seed: int) -> dict[str, np.ndarray]:
    """Images per class of each split.

    Which class gets which count is random, so that being rare says nothing about the shape of a
    glyph. Validation counts rise with the training count, but by far less.

    Returns:
        ``{'train': (C,) int64, 'val': (C,) int64}``.
    """
    limits = (preset.rare_images, preset.common_images, preset.frequent_images)
    curves = (1.0, 1.0, preset.frequent_curve)
    train = np.concatenate(
        [
            _log_linear(n, *limit, curve)
            for n, limit, curve in zip(preset.groups, limits, curves, strict=True)
        ]
    )
    val = _log_linear(len(train), *preset.val_class_images, 1.0)
    order = _rng(seed, STREAM_COUNTS).permutation(len(train))
    return {'train': train[order], 'val': val[order]}


def make_plan(preset: GlyphPreset, seed: int) -> GlyphPlan:
    """Choose the glyphs and fill every image; a few seconds for 1,203 classes."""
    counts = plan_class_counts(preset, seed)
    frequent = counts['train'] > COMMON_MAX_IMAGES
    splits = {
        split: assign_classes(
            counts[split],
            preset.num_images[split],
            frequent,
            preset.class_spread,
            _rng(seed, STREAM_LAYOUT, SPLITS.index(split)),
        )
        for split in SPLITS
    }
    return GlyphPlan(choose_characters(preset, seed), counts, splits)


def assign_classes(
    counts: np.ndarray,
    num_images: int,
    frequent: np.ndarray,
    spread: float,
    rng: np.random.Generator,
) -> SplitPlan:
    """Spread the classes over the images so that class ``c`` is in exactly ``counts[c]`` images.

    The most frequent class goes first. Each class draws its images without replacement with
    weights equal to the room left in them, which keeps images evenly filled; frequent classes
    prefer images without a frequent class, the others prefer images that have one.

    Args:
        counts: (C,) int64, images per class; at most ``num_images`` each.
        num_images: Number of images N.
        frequent: (C,) bool.
        spread: Half-width of the range of classes per image.
        rng: Source of randomness.
    """
    room = _classes_per_image(int(counts.sum()), num_images, spread, rng)
    frequents = np.zeros(num_images, dtype=np.int64)
    members: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(counts)
    for c in np.argsort(-counts, kind='stable'):
        weight = room.astype(np.float64)
        weight *= np.where(frequents == 0, *((4.0, 1.0) if frequent[c] else (1e-3, 1.0)))
        # The n smallest of Exp(1) / weight are a weighted draw without replacement. The floor
        # lets full images take part when nothing else is left.
        key = rng.exponential(size=num_images) / np.maximum(weight, 1e-9)
        members[c] = np.argpartition(key, counts[c] - 1)[: counts[c]]
        room[members[c]] = np.maximum(room[members[c]] - 1, 0)
        if frequent[c]:
            frequents[members[c]] += 1
    images = np.concatenate(members)
    classes = np.repeat(np.arange(len(counts)), counts)
    _fill_empty_images(images, classes, counts, num_images)
    order = np.lexsort((classes, images))
    per_image = np.bincount(images, minlength=num_images)
    return SplitPlan(np.concatenate([[0], np.cumsum(per_image)]), classes[order])


def choose_characters(preset: GlyphPreset, seed: int) -> tuple[str, ...]:
    """Pick one character per class such that no two look alike.

    Candidates are visited in random order and kept when the cosine between their bitmap and that
    of every kept one, at the worst of several rotations, is below a limit. The limit starts at
    ``preset.max_similarity`` and is raised until enough candidates are kept.

    Raises:
        InputError: There are fewer usable glyphs than classes.
    """
    characters, similarity = _candidates(preset.simple_glyphs)
    if len(characters) < preset.num_classes:
        raise InputError(
            f'GlyphPreset {preset.name!r}, `groups`: expected at most {len(characters)} classes, '
            f'found {preset.num_classes}; ask for fewer or set simple_glyphs=False.'
        )
    order = _rng(seed, STREAM_GLYPHS).permutation(len(characters))
    limit = preset.max_similarity
    while True:
        kept: list[int] = []
        for i in order:
            if not kept or similarity[i, kept].max() < limit:
                kept.append(int(i))
            if len(kept) == preset.num_classes:
                return tuple(characters[i] for i in sorted(kept))
        limit += _SIMILARITY_STEP


def _rng(*words: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(words))


def image_rng(seed: int, split: str, image_id: int) -> np.random.Generator:
    """The random stream of one image; independent of every other image and of the workers."""
    return _rng(seed, STREAM_IMAGES, SPLITS.index(split), image_id)


def _log_linear(n: int, low: int, high: int, curve: float) -> np.ndarray:
    position = np.arange(n) / max(n - 1, 1)
    return np.rint(low * (high / low) ** (position**curve)).astype(np.int64)


def _classes_per_image(
    total: int, num_images: int, spread: float, rng: np.random.Generator
) -> np.ndarray:
    """(N,) int64 of sum ``total``, near-uniform within ``spread`` of its mean."""
    mean = total / num_images
    least = min(1, total // num_images)
    room = np.rint(mean + rng.uniform(-spread, spread, num_images)).astype(np.int64)
    room = np.maximum(room, least)
    while (missing := total - int(room.sum())) != 0:
        movable = np.flatnonzero(room > least) if missing < 0 else np.arange(num_images)
        chosen = rng.permutation(movable)[: abs(missing)]
        room[chosen] += np.sign(missing)
    return room


def _fill_empty_images(
    images: np.ndarray, classes: np.ndarray, counts: np.ndarray, num_images: int
) -> None:
    """Move one class, in place, from the fullest image to each image that has none."""
    per_image = np.bincount(images, minlength=num_images)
    for empty in np.flatnonzero(per_image == 0):
        donor = int(np.argmax(per_image))
        if per_image[donor] < 2:
            return
        pairs = np.flatnonzero(images == donor)
        moved = pairs[np.argmax(counts[classes[pairs]])]
        images[moved] = empty
        per_image[donor] -= 1
        per_image[empty] += 1


@lru_cache(maxsize=1)
def _candidates(simple: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """Usable characters and their (n, n) similarity: slow to compute, the same for all seeds."""
    characters = tuple(c for c in common_characters() if _is_candidate(c, simple))
    return characters, _similarity(characters)


def _is_candidate(character: str, simple: bool) -> bool:
    name = unicodedata.name(character, '')
    category = unicodedata.category(character)
    # Letters, numbers, punctuation and symbols; marks and modifiers are specks on their own.
    if not name or category[0] not in 'LNPS' or category in ('Lm', 'Sk'):
        return False
    if any(word in name for word in _LEFT_OUT_NAMES):
        return False
    if simple and (unicodedata.decomposition(character) or ' WITH ' in name):
        return False
    bitmap = glyph_bitmap(character)
    return (
        bitmap is not None
        and max(bitmap.size) < 3.2 * min(bitmap.size)
        and (np.asarray(bitmap) > 127).mean() > 0.08
    )


def _similarity(characters: Sequence[str]) -> np.ndarray:
    """(n, n) float64 cosine of the glyph bitmaps at the worst of several relative rotations.

    Bitmaps hold integers up to 63, so every sum is exact in float32 and the result does not
    depend on the linear-algebra library or its threads.
    """
    upright = np.stack([glyph_signature(c, 0) for c in characters])
    norm = np.sqrt((upright.astype(np.float64) ** 2).sum(1))
    best = np.zeros((len(characters), len(characters)))
    for angle in _ANGLES:
        turned = np.stack([glyph_signature(c, angle) for c in characters])
        turned_norm = np.sqrt((turned.astype(np.float64) ** 2).sum(1))
        product = (upright @ turned.T).astype(np.float64)
        best = np.maximum(best, product / norm[:, None] / turned_norm)
    return np.maximum(best, best.T)
