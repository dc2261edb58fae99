"""A Glyph-LVIS preset that is drawn in a fraction of a second, and ways to compare folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mmdet_lt.datasets.glyph_lvis import GlyphPreset, generate_glyph_lvis

# Six classes of all three groups; several shards, so that two workers share the work.
TINY = GlyphPreset(
    name='tiny',
    image_size=64,
    train_images=110,
    val_images=8,
    groups=(2, 2, 2),
    rare_images=(2, 4),
    common_images=(11, 20),
    frequent_images=(101, 105),
    val_class_images=(3, 5),
    glyph_size=(10, 24),
    not_exhaustive_rate=0.3,
    max_similarity=0.5,
)


def make(out: Path, seed: int = 0, workers: int = 1, preset: GlyphPreset | str = TINY) -> Path:
    return generate_glyph_lvis(preset, out, seed, workers, progress=False)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob('*'))}
