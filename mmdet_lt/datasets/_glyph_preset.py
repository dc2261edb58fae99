"""What a Glyph-LVIS data set is made of: the frozen parameters and the two shipped presets."""

from __future__ import annotations

from dataclasses import dataclass

from mmdet_lt.errors import InputError

RARE_MAX_IMAGES = 10
COMMON_MAX_IMAGES = 100


@dataclass(frozen=True)
class GlyphPreset:
    """Everything besides the seed that decides the content of a data set.

    The number of training images that show a class is log-linear within each frequency group: for
    class ``k`` of ``n`` in a group with limits ``(low, high)``

        images(k) = low · (high / low) ** ((k / (n − 1)) ** curve)

    where ``curve`` is 1, or ``frequent_curve`` for the frequent group (below 1: more classes near
    the top, which is LVIS v1's shape).

    Attributes:
        name: Name of the preset; part of the identity of a folder.
        image_size: Side of the square images, pixels.
        train_images: Number of training images.
        val_images: Number of validation images.
        groups: Number of (rare, common, frequent) classes.
        rare_images: Fewest and most training images of a rare class, within 1..10.
        common_images: The same of a common class, within 11..100.
        frequent_images: The same of a frequent class, at least 101.
        frequent_curve: Exponent of the formula above for the frequent group.
        val_class_images: Validation images of the rarest and of the most frequent class.
        class_spread: Classes per image vary by about this much around their mean.
        repeat_chance: Chance that a class of an image gets one more instance (geometric).
        max_instances: Instances per image above which no repeats are drawn.
        glyph_size: Smallest and largest longer side of a glyph before rotation, pixels
            (log-uniform between them).
        max_rotation: Rotation is uniform within plus and minus this, degrees.
        max_similarity: First limit on the cosine of two classes' glyph bitmaps; it is raised in
            steps until enough classes are found.
        simple_glyphs: Leave out letters with accents and other composed characters.
        negative_fraction: Share of the absent classes that an image lists as verified absent.
        not_exhaustive_rate: Share of the images with one drawn but not annotated instance.

    Raises:
        InputError: The parameters contradict each other.
    """

    name: str
    image_size: int
    train_images: int
    val_images: int
    groups: tuple[int, int, int]
    rare_images: tuple[int, int] = (1, 10)
    common_images: tuple[int, int] = (11, 100)
    frequent_images: tuple[int, int] = (101, 1977)
    frequent_curve: float = 1.0
    val_class_images: tuple[int, int] = (1, 1)
    class_spread: float = 1.0
    repeat_chance: float = 0.2
    max_instances: int = 6
    glyph_size: tuple[int, int] = (16, 56)
    max_rotation: float = 30.0
    max_similarity: float = 0.6
    simple_glyphs: bool = True
    negative_fraction: float = 0.5
    not_exhaustive_rate: float = 0.03

    def __post_init__(self) -> None:
        limits = {
            'rare_images': (1, RARE_MAX_IMAGES),
            'common_images': (RARE_MAX_IMAGES + 1, COMMON_MAX_IMAGES),
            'frequent_images': (COMMON_MAX_IMAGES + 1, self.train_images),
        }
        for count, (key, (least, most)) in zip(self.groups, limits.items(), strict=True):
            low, high = getattr(self, key)
            most = min(most, self.train_images)
            if count and not least <= low <= high <= most:
                self._refuse(key, f'two rising values within {least}..{most}', (low, high))
        if min(self.groups) < 0 or self.num_classes < 1:
            self._refuse('groups', 'three counts of at least 0, not all 0', self.groups)
        low, high = self.val_class_images
        if not 1 <= low <= high <= self.val_images:
            self._refuse(
                'val_class_images', f'two rising values within 1..{self.val_images}', (low, high)
            )
        low, high = self.glyph_size
        if not 8 <= low <= high <= self.image_size // 2:
            self._refuse(
                'glyph_size', f'two rising values within 8..{self.image_size // 2}', (low, high)
            )
        for key in ('repeat_chance', 'negative_fraction', 'not_exhaustive_rate'):
            if not 0 <= getattr(self, key) <= 1:
                self._refuse(key, 'a share within 0..1', getattr(self, key))

    def _refuse(self, key: str, expected: str, found: object) -> None:
        raise InputError(
            f'GlyphPreset {self.name!r}, `{key}`: expected {expected}, found {found!r}; correct it.'
        )

    @property
    def num_classes(self) -> int:
        """Number of classes over the three groups."""
        return sum(self.groups)

    @property
    def num_images(self) -> dict[str, int]:
        """Number of images of each split, in the order in which they are made."""
        return {'train': self.train_images, 'val': self.val_images}

    @property
    def bytes_per_image(self) -> int:
        """Disk need of an image and its annotations: about 1 byte per pixel and 10 kB."""
        return self.image_size**2 + 10_000


PRESETS: dict[str, GlyphPreset] = {
    'mini': GlyphPreset(
        name='mini',
        image_size=128,
        train_images=2000,
        val_images=400,
        groups=(12, 14, 14),
        rare_images=(3, 10),
        common_images=(11, 100),
        frequent_images=(101, 700),
        val_class_images=(24, 34),
    ),
    # LVIS v1: 337 rare, 461 common and 405 frequent classes in 1 to 1,977 training images; the
    # curve makes about 361,400 image-class pairs, nine per image.
    'full': GlyphPreset(
        name='full',
        image_size=256,
        train_images=40_000,
        val_images=6_000,
        groups=(337, 461, 405),
        frequent_curve=0.58,
        val_class_images=(12, 90),
        class_spread=3.0,
        max_instances=18,
        glyph_size=(16, 72),
        max_similarity=0.9,
        simple_glyphs=False,
        negative_fraction=0.03,
    ),
}
