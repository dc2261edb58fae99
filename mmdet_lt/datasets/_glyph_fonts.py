"""Glyph bitmaps from the DejaVu faces inside matplotlib."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from mmdet_lt.errors import InputError

# Regular first: classes are compared with each other in this face.
FACES = tuple(
    f'DejaVu{family}{style}.ttf'
    for family, styles in {
        'Sans': ('', '-Bold', '-Oblique', '-BoldOblique'),
        'SansMono': ('', '-Bold', '-Oblique', '-BoldOblique'),
        'Serif': ('', '-Bold', '-Italic', '-BoldItalic'),
    }.items()
    for style in styles
)
# Glyphs are drawn once at this size (pixels per em) and scaled down from there.
_EM = 96
_SIGNATURE_SIDE = 20


def font_folder() -> Path:
    """Folder of the TrueType fonts that matplotlib carries."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / 'fonts' / 'ttf'


@lru_cache(maxsize=1)
def common_characters() -> tuple[str, ...]:
    """Characters for which all 12 faces have a glyph, rising by code point.

    Raises:
        InputError: A face is missing from this matplotlib.
    """
    from matplotlib.ft2font import FT2Font

    folder = font_folder()
    for face in FACES:
        if not (folder / face).is_file():
            raise InputError(
                f'{folder}: expected the font {face}, found nothing; reinstall matplotlib.'
            )
    maps = [set(FT2Font(str(folder / face)).get_charmap()) for face in FACES]
    return tuple(chr(code) for code in sorted(set.intersection(*maps)))


@lru_cache(maxsize=len(FACES))
def _font(face: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine gives the same result with and without libraqm.
    path = str(font_folder() / FACES[face])
    return ImageFont.truetype(path, _EM, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=4096)
def glyph_bitmap(character: str, face: int = 0) -> Image.Image | None:
    """Grey bitmap of a glyph at 96 pixels per em, cut to its ink; None when it has no ink."""
    font = _font(face)
    left, top, right, bottom = (int(v) for v in font.getbbox(character))
    bitmap = Image.new('L', (right - left + 8, bottom - top + 8))
    ImageDraw.Draw(bitmap).text((4 - left, 4 - top), character, fill=255, font=font)
    box = bitmap.getbbox()
    return bitmap.crop(box) if box else None


def scaled_glyph(bitmap: Image.Image, size: float, aspect: float, angle: float) -> Image.Image:
    """Scale a bitmap to a longer side of ``size`` pixels, stretch its width, rotate it.

    Args:
        bitmap: Grey bitmap of mode 'L'.
        size: Longer side before stretching and rotating, pixels.
        aspect: Factor on the width.
        angle: Rotation, degrees counter-clockwise.
    """
    scale = size / max(bitmap.size)
    width = max(2, round(bitmap.width * scale * aspect))
    height = max(2, round(bitmap.height * scale))
    small = bitmap.resize((width, height), Image.Resampling.BILINEAR)
    return small.rotate(angle, Image.Resampling.BICUBIC, expand=True)


@lru_cache(maxsize=4096)
def _normalised_glyph(character: str) -> Image.Image:
    """The glyph on a 96 × 96 canvas: ink centred, root mean square radius 18 pixels, blurred.

    Centre and radius come from the ink and not from its box, so that a rotated copy of a shape
    lands on top of the shape.
    """
    bitmap = glyph_bitmap(character)
    ink = np.asarray(bitmap).astype(np.float64)
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]]
    centre_y, centre_x = (y * ink).sum() / ink.sum(), (x * ink).sum() / ink.sum()
    spread = ((y - centre_y) ** 2 + (x - centre_x) ** 2) * ink
    zoom = np.sqrt(spread.sum() / ink.sum()) / 18
    # PIL's affine maps output to input coordinates.
    matrix = (zoom, 0, centre_x - 48 * zoom, 0, zoom, centre_y - 48 * zoom)
    size = (96, 96)
    image = bitmap.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return image.filter(ImageFilter.GaussianBlur(1))


def glyph_signature(character: str, angle: int) -> np.ndarray:
    """(400,) float32 of whole numbers 0..63: the normalised glyph, rotated, on 20 × 20 cells."""
    turned = _normalised_glyph(character).rotate(angle, Image.Resampling.BILINEAR)
    small = turned.resize((_SIGNATURE_SIDE, _SIGNATURE_SIDE), Image.Resampling.BOX)
    return (np.asarray(small).astype(np.int64) * 63 // 255).astype(np.float32).ravel()
