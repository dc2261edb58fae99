"""Test a detector and print its metrics: MMDetection's options."""

from __future__ import annotations

import argparse
import copy
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == '__main__':
    # Loading the libraries takes seconds; until then an interrupt has nothing to tidy up.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # This clone goes first, and the folder of the tools is no place to import from.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from mmdet_lt.engine import checkpoints, cpu_distributed, launch
from mmdet_lt.engine.data_check import check_data_files
from mmdet_lt.errors import InputError


def get_parser() -> argparse.ArgumentParser:
    """Options of the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    launch.add_common_arguments(parser)
    parser.add_argument('--out', metavar='FILE.pkl', help='also write all predictions to a pickle')
    parser.add_argument('--show', action='store_true', help='show images with predictions')
    parser.add_argument('--show-dir', help='folder, below the log folder, for painted images')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds per shown image')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser


def apply_options(cfg: Config, args: argparse.Namespace) -> None:
    """Write the options into the config.

    Raises:
        InputError: The config cannot follow an option.
    """
    for key in ('test_dataloader', 'test_cfg', 'test_evaluator'):
        if not cfg.get(key):
            raise InputError(f'config file {args.config}: key `{key}` expected, found none.')
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise InputError(f'--out expects a file name ending in .pkl or .pickle, found {args.out}.')
    cfg.resume, cfg.load_from = False, args.checkpoint
    if args.show or args.show_dir:
        hook = (cfg.get('default_hooks') or {}).get('visualization')
        if not hook:
            raise InputError(
                '--show and --show-dir expect `default_hooks.visualization` (DetVisualizationHook) '
                f'in {args.config}, found none.'
            )
        hook.draw = True
        if args.show:
            hook.show, hook.wait_time = True, args.wait_time
        if args.show_dir:
            hook.test_out_dir = args.show_dir
    if args.tta:
        apply_tta(cfg)


def apply_tta(cfg: Config) -> None:
    """Put the model into a test-time augmentation model and the data into its pipeline.

    ``tta_model`` and ``tta_pipeline`` of the config are used where given, otherwise each image is
    also tested flipped.
    """
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_model' not in cfg:
        limits = merge_settings(cfg.model.get('test_cfg') or {})
        print_log(f'No `tta_model` in the config: flip test merged with {limits}.', 'current')
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=limits)
    if 'tta_pipeline' not in cfg:
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        pack = copy.deepcopy(dataset.pipeline[-1])
        keys = pack.get('meta_keys') or ('img_id', 'img_path', 'ori_shape', 'img_shape')
        # Merging needs to know how a view was flipped.
        needed = (*keys, 'scale_factor', 'flip', 'flip_direction')
        pack.meta_keys = tuple(dict.fromkeys(needed))
        views = dict(type='TestTimeAug', transforms=[flips, [pack]])
        cfg.tta_pipeline = [*copy.deepcopy(dataset.pipeline[:-1]), views]
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def merge_settings(test_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """NMS and number of detections for merging views, as the model itself uses them.

    MMDetection's own tool always keeps 100 detections per image after an NMS at 0.5. On LVIS, where
    300 are scored, that alone would cost AP, so the settings of the model are taken.
    """
    # Two-stage models keep the settings of the final boxes under `rcnn`.
    final = test_cfg.get('rcnn') or test_cfg
    if isinstance(final, list | tuple):
        final = final[-1]
    nms = final.get('nms') or dict(type='nms', iou_threshold=0.5)
    return dict(nms=copy.deepcopy(nms), max_per_img=final.get('max_per_img', 100))


def main(argv: Sequence[str] | None = None) -> None:
    """Test."""
    args = launch.parse_arguments(get_parser(), argv)
    cfg = launch.load_config(args)
    cpu_distributed.check_launcher(args.launcher)
    checkpoints.check_checkpoint(args.checkpoint, 'argument checkpoint')
    apply_options(cfg, args)
    check_data_files(cfg, ('test',))
    runner = launch.build_runner(cfg)
    if args.out:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()


if __name__ == '__main__':
    sys.exit(launch.run_cli(main))
