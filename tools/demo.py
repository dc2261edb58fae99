"""The demo: a plain and a long-tailed recipe on Glyph-LVIS mini, a table and a report.

Finished trainings are reused, interrupted ones go on; ``--fresh`` trains again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from mmcv.ops import get_compiling_cuda_version

from mmdet_lt import ClassStatistics
from mmdet_lt.datasets.glyph_lvis import generate_glyph_lvis
from mmdet_lt.engine import launch
from mmdet_lt.engine.compare import compare
from mmdet_lt.engine.compare_table import table
from mmdet_lt.errors import InputError
from mmdet_lt.visualization.predict import write_examples
from mmdet_lt.visualization.report import write_report

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {
    'baseline': 'configs/quickstart/faster-rcnn_r18_ce_random_glyph-lvis-mini.py',
    'long-tailed': 'configs/quickstart/faster-rcnn_r18_ce_sample0.25_glyph-lvis-mini.py',
}


def choose_device() -> str:
    """The GPU if torch sees one and mmcv has operators for it, else the CPU."""
    if not torch.cuda.is_available():
        print('Training on the CPU.', flush=True)
        return 'cpu'
    if get_compiling_cuda_version() == 'not available':
        # mmcv was built without a CUDA compiler: NMS and RoIAlign would fail on the GPU.
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # for the trainings, which are processes
        print('Training on the CPU: mmcv has no CUDA operators, see docs/installation.md.')
        return 'cpu'
    print(f'Training on {torch.cuda.get_device_name(0)}.', flush=True)
    return 'cuda'


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, default=1, help='seeds of each recipe')
    parser.add_argument('--iters', type=int, help='iterations of each training')
    parser.add_argument('--jobs', type=int, default=1, help='trainings side by side')
    parser.add_argument('--out', default='work_dirs/demo', help='folder of the results')
    parser.add_argument('--fresh', action='store_true', help='forget earlier trainings')
    args = parser.parse_args(argv)
    os.chdir(ROOT)  # the configs name the data relative to the repository
    started = time.time()
    out = Path(args.out)
    device = choose_device()
    print('Data: Glyph-LVIS mini.', flush=True)
    data = generate_glyph_lvis('mini', 'data/glyph_lvis_mini', seed=0)
    if args.fresh:
        for label in RECIPES:
            shutil.rmtree(out / label, ignore_errors=True)
    results = compare(RECIPES, out, range(args.seeds), args.iters, args.jobs, overwrite=True)
    for result in results:
        if 'failed' in result:
            raise InputError(result['failed'])

    stats = ClassStatistics.from_file(data / 'annotations' / 'glyph_lvis_train.json')
    runs = {}
    for label in RECIPES:
        folder = out / label / 'seed0'
        checkpoint = (folder / 'last_checkpoint').read_text().strip()
        write_examples(
            folder / 'config.py', checkpoint, folder / 'examples.json', stats, device=device
        )
        runs[label] = folder
    report = write_report(runs, out / 'report.html', stats, title='mmdet_lt demo')
    text = table(results)
    (out / 'table.md').write_text(text + '\n')
    print(f'\n{text}\n\nReport: {report} ({time.time() - started:.0f} s in all)')


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
