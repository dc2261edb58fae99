"""A toy data set with a detector of its own, and CAMs for it, shared by the tests of CAMs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from toy import make_toy_coco, toy_config

from mmdet_lt.cam.masks import encode
from mmdet_lt.cam.store import write_cams
from mmdet_lt.utils.files import file_digest


def cam_config(folder: Path, model: str = 'faster_rcnn', dataset: str = 'mmdet_lt.LVISDataset'):
    """Config for the toy data in a folder, without training a detector."""
    cfg = toy_config(folder, model)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.type = dataset
    return cfg


def save_checkpoint(cfg: Config, path: Path, seed: int = 0) -> Path:
    """Random weights of the config's detector, large enough for maps that are not flat."""
    init_default_scope('mmdet')
    torch.manual_seed(seed)
    model = DETECTORS.build(cfg.model)
    model.init_weights()
    for name, parameter in model.named_parameters():
        if 'fc_cls' in name or 'retina_cls' in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return path


def toy_cams(folder: Path, mask, **header) -> Path:
    """A CAM file for the toy data; ``mask(height, width)`` gives the mask of each window."""
    ann_file = folder / 'train.json'
    data = json.loads(ann_file.read_text())
    entries = []
    for annotation in data['annotations']:
        width, height = (round(v) for v in annotation['bbox'][2:])
        entries.append((annotation['id'], height, width, encode(mask(height, width))))
    plain = dict(
        classes=[c['name'] for c in data['categories']],
        annotation_file=ann_file.name,
        annotation_digest=file_digest(ann_file),
        checkpoint='stage1.pth',
        checkpoint_digest='0' * 32,
        method='gradcam',
    )
    write_cams(folder / 'toy.cams', {**plain, **header}, entries)
    return folder / 'toy.cams'


__all__ = ['cam_config', 'make_toy_coco', 'save_checkpoint', 'toy_cams']
