"""Bad input of LVISMetric: one sentence that says what to change."""

import copy

import numpy as np
import pytest
import torch
from evaluation_tools import classes_of, empty_sample, run, write

from mmdet_lt.errors import InputError
from mmdet_lt.evaluation.metrics.lvis_metric import LVISMetric
from mmdet_lt.statistics import ClassStatistics


def test_bad_settings(set_up, tmp_path):
    path, *_ = set_up
    with pytest.raises(InputError, match="'proposal'"):
        LVISMetric(path, metric='proposal')
    with pytest.raises(InputError, match='missing.json'):
        LVISMetric(tmp_path / 'missing.json')
    with pytest.raises(InputError, match='outfile_prefix'):
        LVISMetric(path, format_only=True)
    with pytest.raises(InputError, match='max_dets'):
        LVISMetric(path, max_dets=0)
    with pytest.raises(InputError, match='iou_thrs'):
        LVISMetric(path, iou_thrs=[1.5])
    with pytest.raises(InputError, match='class_statistics'):
        LVISMetric(path, class_statistics=str(tmp_path / 'nothing.json'))


@pytest.mark.parametrize('share', [0, 0.3, 0.999])
def test_truncated_file_stops_at_construction(set_up, tmp_path, share):
    text = open(set_up[0]).read()
    (tmp_path / 'cut.json').write_text(text[: int(share * len(text))].rstrip('}'))
    with pytest.raises(InputError, match='not complete JSON'):
        LVISMetric(tmp_path / 'cut.json')


def test_file_cut_after_a_brace_stops_at_the_evaluation(set_up, tmp_path):
    """The cheap check cannot see this one."""
    _, data, samples = set_up
    text = open(set_up[0]).read()
    (tmp_path / 'cut.json').write_text(text[: text.rindex('}', 0, len(text) // 2) + 1])
    with pytest.raises(InputError, match='not complete JSON'):
        run(tmp_path / 'cut.json', data, samples)


def test_other_images_or_labels(set_up):
    path, data, samples = set_up
    with pytest.raises(InputError, match='image id 987654'):
        run(path, data, [*samples, empty_sample(987654)])
    with pytest.raises(InputError, match='label .* 3 classes'):
        run(path, data, samples, classes=classes_of(data)[:3])
    with pytest.raises(InputError, match="'zebra'"):
        run(path, data, samples, classes=[*classes_of(data)[:-1], 'zebra'])
    with pytest.raises(InputError, match='class 9'):
        run(path, data, samples, classes=[*classes_of(data), 'zebra'])
    with pytest.raises(InputError, match='another data set'):
        run(path, data, samples, class_statistics=ClassStatistics(['x'], [1], [1], 1))


def test_impossible_predictions(set_up):
    path, data, samples = set_up
    nan = empty_sample(samples[0]['img_id'])
    nan['pred_instances'].update(
        bboxes=torch.zeros(1, 4), scores=torch.tensor([np.nan]), labels=torch.zeros(1)
    )
    with pytest.raises(InputError, match='NaN'):
        run(path, data, [nan])
    other_size = copy.deepcopy(samples)
    for sample in other_size:
        sample['pred_instances']['masks'] = sample['pred_instances']['masks'][:, ::2]
    with pytest.raises(InputError, match='height x width'):
        run(path, data, other_size, metric='segm')
    for sample in samples:
        del sample['pred_instances']['masks']
    with pytest.raises(InputError, match='mask head'):
        run(path, data, samples, metric='segm')


def break_category(data):
    data['annotations'][3]['category_id'] = 10**6


def break_image(data):
    data['annotations'][3]['image_id'] = 10**6


def break_frequency(data):
    data['categories'][0]['frequency'] = 'rare'


def break_name(data):
    data['categories'][0]['name'] = data['categories'][1]['name']


def break_section(data):
    del data['categories']


def break_mask(data):
    del data['annotations'][0]['segmentation']


@pytest.mark.parametrize(
    ('damage', 'sentence'),
    [
        (break_category, 'category_id 1000000'),
        (break_image, 'image_id 1000000'),
        (break_frequency, "'rare'"),
        (break_name, 'twice'),
        (break_section, 'no list `categories`'),
        (break_mask, 'no `segmentation`'),
    ],
)
def test_damaged_annotations(set_up, tmp_path, damage, sentence):
    _, data, samples = set_up
    classes = classes_of(data)
    damage(data)
    path = write(tmp_path / 'damaged.json', data)
    with pytest.raises(InputError, match=sentence):
        run(path, data, samples, classes, metric='segm')
