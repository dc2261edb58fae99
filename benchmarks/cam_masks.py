"""Compare foreground masks by CAM with the annotated masks of the same objects.

Prints, as means over objects: intersection over union, precision (share of the CAM mask on
the object), recall (share of the object that is in the CAM mask), share of the box in the CAM mask,
and for scale the share of the box that the object itself fills: a mask that knows nothing has that
precision.

Example:
    python benchmarks/cam_masks.py CONFIG gradcam.cams hirescam.cams
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from tqdm import tqdm

from mmdet_lt.cam.masks import segmentation_mask
from mmdet_lt.datasets._paste_bank import PasteBank
from mmdet_lt.datasets.records import unwrap_datasets


def compare(bank: PasteBank) -> dict[str, float]:
    """Means over all objects of a bank that have an annotated mask."""
    values = []
    for row in tqdm(range(len(bank.image)), leave=False):
        request = bank.request(row, 0)
        instance = bank.dataset.get_data_info(int(bank.image[row]))['instances'][bank.position[row]]
        (x0, y0, x1, y1), mask = request.foreground()
        true = segmentation_mask(instance['mask'], request.height, request.width)[y0:y1, x0:x1]
        both = np.count_nonzero(mask & true)
        values.append(
            (
                both / np.count_nonzero(mask | true),
                both / np.count_nonzero(mask),
                both / max(np.count_nonzero(true), 1),
                mask.mean(),
                true.mean(),
            )
        )
    names = ('IoU', 'precision', 'recall', 'share of box', 'object share of box')
    return dict(zip(names, np.mean(values, 0), strict=True))


def main() -> None:
    """Print one row for each file."""
    from mmdet.registry import DATASETS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config')
    parser.add_argument('cams', nargs='+')
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    init_default_scope(cfg.default_scope)
    dataset = unwrap_datasets(DATASETS.build(cfg.train_dataloader.dataset))[0]
    for path in args.cams:
        bank = PasteBank(dataset, 'cam', path)
        found = compare(bank)
        text = ', '.join(f'{name} {value:.3f}' for name, value in found.items())
        print(f'{path}: {len(bank.image)} objects: {text}')


if __name__ == '__main__':
    main()
