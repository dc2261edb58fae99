"""Merge the pieces of a Glyph-LVIS run into annotation files in LVIS v1 format."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from mmdet_lt.datasets._glyph_plan import GlyphPlan, frequency_group
from mmdet_lt.datasets._glyph_preset import GlyphPreset
from mmdet_lt.datasets._glyph_store import (
    FORMAT_VERSION,
    annotation_name,
    atomic_write,
    dump,
    image_name,
    read_shards,
)


def write_annotations(
    out: Path, preset: GlyphPreset, seed: int, plan: GlyphPlan, split: str, shards: list[Path]
) -> np.ndarray:
    """Merge the shards of one split into an LVIS v1 file, counting on the way.

    The shards are read once per section, so memory does not grow with the number of images. The
    categories come last: they carry the counts of the training split, also in the validation
    file, so the training file has to be written first.

    Returns:
        Images per class of this split as found in the annotations, (C,) int64.
    """
    images = np.zeros(len(plan.characters), dtype=np.int64)
    instances = np.zeros_like(images)
    info = {
        'description': f'Glyph-LVIS, preset {preset.name}, seed {seed}, split {split}',
        'version': str(FORMAT_VERSION),
    }
    with atomic_write(out / annotation_name(split)) as file:
        file.write(f'{{"info":{dump(info)},"licenses":[],"images":[')
        comma = '\n'
        for record in read_shards(shards):
            classes = np.array([a[0] - 1 for a in record['annotations']], dtype=np.int64)
            np.add.at(instances, classes, 1)
            images[np.unique(classes)] += 1
            name = image_name(split, record['id'])
            entry = {
                'id': record['id'],
                'file_name': name,
                # mmdet's LVISV1Dataset takes the file name from this address.
                'coco_url': f'http://images.cocodataset.org/{name}',
                'width': preset.image_size,
                'height': preset.image_size,
                'neg_category_ids': record['neg'],
                'not_exhaustive_category_ids': record['not_exhaustive'],
            }
            file.write(comma + dump(entry))
            comma = ',\n'
        file.write('\n],"annotations":[')
        comma, annotation_id = '\n', 0
        for record in read_shards(shards):
            for category_id, box, area, counts in record['annotations']:
                annotation_id += 1
                entry = {
                    'id': annotation_id,
                    'image_id': record['id'],
                    'category_id': category_id,
                    'bbox': box,
                    'area': area,
                    'segmentation': {'size': [preset.image_size] * 2, 'counts': counts},
                }
                file.write(comma + dump(entry))
                comma = ',\n'
        train_counts = (images, instances) if split == 'train' else _train_counts(out)
        categories = _categories(plan.characters, *train_counts)
        file.write('\n],"categories":[\n' + ',\n'.join(dump(c) for c in categories) + '\n]}\n')
    return images


def _train_counts(out: Path) -> tuple[np.ndarray, np.ndarray]:
    # Categories are the last section and one line each; no need to parse the whole file.
    with open(out / annotation_name('train'), encoding='utf-8') as file:
        for line in file:
            if line.startswith('],"categories":['):
                break
        rows = [json.loads(line.rstrip(',\n')) for line in file if line.startswith('{')]
    return (
        np.array([row['image_count'] for row in rows], dtype=np.int64),
        np.array([row['instance_count'] for row in rows], dtype=np.int64),
    )


def _categories(
    characters: tuple[str, ...], images: np.ndarray, instances: np.ndarray
) -> list[dict[str, Any]]:
    rows = []
    for k, character in enumerate(characters):
        title = unicodedata.name(character)
        name = title.lower().replace(' ', '_')
        rows.append(
            {
                'id': k + 1,
                'name': name,
                'synset': f'{name}.n.01',
                'synonyms': [name, character],
                'def': f'the character U+{ord(character):04X} ({title}) in any DejaVu face',
                'image_count': int(images[k]),
                'instance_count': int(instances[k]),
                'frequency': frequency_group(int(images[k])),
            }
        )
    return rows
