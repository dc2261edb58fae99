"""A user's own COCO data: ids with gaps, no frequencies, two classes without any training box."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import class_names, make_toy_coco, write_toy_config

from mmdet_lt import ClassStatistics

TOOLS = Path(__file__).resolve().parents[1] / 'tools'
IDS = [3, 7, 11, 90, 91, 200, 1000]


def renumber(path, absent=()):
    """Give the toy categories the ids of the user, in a shuffled order, and drop two classes."""
    data = json.loads(path.read_text())
    for category in data['categories']:
        category['id'] = IDS[category['id'] - 1]
    data['categories'] = data['categories'][3:] + data['categories'][:3]
    for annotation in data['annotations']:
        annotation['category_id'] = IDS[annotation['category_id'] - 1]
    data['annotations'] = [a for a in data['annotations'] if a['category_id'] not in absent]
    path.write_text(json.dumps(data))


def run(tool, *args):
    command = [sys.executable, str(TOOLS / tool), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize('kind', ['mmdet_lt.LVISDataset', 'CocoDataset'])
def test_train_and_test(tmp_path, kind):
    data = tmp_path / 'data'
    train = make_toy_coco(data, num_images=10, num_classes=7)
    val = make_toy_coco(data, num_images=4, num_classes=7, boxes_per_image=4, name='val')
    renumber(train, absent=(11, 1000))
    renumber(val)
    loss = dict(_delete_=True, type='mmdet_lt.EQLv2Loss', use_sigmoid=True)
    evaluator = dict(type='mmdet_lt.LVISMetric', ann_file=str(val), metric='bbox', classwise=True)
    names = class_names(7) if kind == 'mmdet_lt.LVISDataset' else _file_order(train)
    config = write_toy_config(
        tmp_path / 'cfg.py',
        data,
        'faster_rcnn',
        num_classes=7,
        extra=(
            "custom_imports = dict(imports=['mmdet_lt'])\n"
            "custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook', thresholds=(2, 4))]\n"
            'val_dataloader = test_dataloader\n'
            f'val_evaluator = test_evaluator = {evaluator!r}\n'
            "val_cfg = dict(type='ValLoop')\n"
            'train_cfg.update(val_interval=1)\n'
        ),
        overrides={
            'train_dataloader.dataset.type': kind,
            'test_dataloader.dataset.type': kind,
            'train_dataloader.dataset.metainfo.classes': names,
            'test_dataloader.dataset.metainfo.classes': names,
            'test_dataloader.dataset.ann_file': 'val.json',
            'test_dataloader.dataset.data_prefix.img': 'val/',
            'model.roi_head.bbox_head.loss_cls': loss,
            'train_dataloader.sampler': dict(
                _delete_=True, type='mmdet_lt.RepeatFactorSampler', repeat_thr=0.5
            ),
        },
    )
    out = tmp_path / 'out'
    log = run('train.py', config, '--work-dir', out)
    assert '7 classes: ' in log
    scalars = [json.loads(line) for f in out.glob('*/vis_data/scalars.json') for line in f.open()]
    metrics = next(line for line in scalars if 'lvis/bbox_AP' in line)
    stats = ClassStatistics.from_file(train).with_thresholds((2, 4))
    assert (stats.image_count[[2, 6]] == 0).all() and (stats.image_count > 0).sum() == 5
    for group in 'rcf':
        present = bool((stats.groups == group).any())
        assert (metrics[f'lvis/bbox_AP{group}'] >= 0) == present

    state = torch.load(out / 'epoch_1.pth', weights_only=True)['state_dict']
    ratio = state['roi_head.bbox_head.loss_cls.pos_grad']
    order = [names.index(name) for name in class_names(7)]
    assert ((ratio[order] > 0) == torch.from_numpy(stats.image_count > 0)).all()

    result = run('test.py', config, out / 'epoch_1.pth', '--work-dir', tmp_path / 'test')
    assert f'lvis/bbox_AP: {metrics["lvis/bbox_AP"]:.4f}' in result


def _file_order(path):
    """Names as MMDetection's CocoDataset numbers them: in file order, whatever `classes` says."""
    return tuple(c['name'] for c in json.loads(path.read_text())['categories'])
