"""What is wrong with the data is said in one sentence, before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from toy import make_toy_coco, write_toy_config

TRAIN = Path(__file__).resolve().parents[2] / 'tools' / 'train.py'
HOOK = "custom_imports = dict(imports=['mmdet_lt'])\n"
HOOK += "custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook')]\n"


def _truncate(path):
    path.write_text(path.read_text()[:-30])


def _unknown_category(path):
    data = json.loads(path.read_text())
    data['annotations'][3]['category_id'] = 77
    path.write_text(json.dumps(data))


def _other_names(path):
    data = json.loads(path.read_text())
    for category in data['categories']:
        category['name'] += ' renamed'
    path.write_text(json.dumps(data))


OURS = {'train_dataloader.dataset.type': 'mmdet_lt.LVISDataset'}
CASES = {
    'missing file': (lambda p: p.unlink(), {}, ['train.json', 'train_dataloader.dataset.ann_file']),
    'truncated file': (_truncate, {}, ['train.json', 'not complete JSON']),
    'unknown category': (_unknown_category, OURS, ['train.json', 'category_id 77', '3 ids']),
    'missing image': (
        lambda p: (p.parent / 'train' / '0002.png').unlink(),
        {},
        ['1 of the 8 images', '0002.png', 'data_prefix.img'],
    ),
    'other names': (_other_names, {}, ['no box of the 3 classes', 'metainfo.classes']),
    'other names, own data set': (_other_names, OURS, ['class_0', 'metainfo.classes']),
    'class counts': (lambda p: None, {'model.bbox_head.num_classes': 7}, ['is 7', 'are 3']),
}


@pytest.mark.parametrize('case', list(CASES))
def test_one_sentence_and_nothing_written(tmp_path, case):
    damage, overrides, words = CASES[case]
    damage(make_toy_coco(tmp_path / 'data'))
    config = write_toy_config(
        tmp_path / 'cfg.py', tmp_path / 'data', extra=HOOK, overrides=overrides
    )
    command = [sys.executable, str(TRAIN), str(config), '--work-dir', str(tmp_path / 'out')]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith('error: ') and 'Traceback' not in done.stderr
    for word in words:
        assert word in sentence, sentence
    assert not list((tmp_path / 'out').glob('*.pth'))
