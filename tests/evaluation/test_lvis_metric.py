"""LVISMetric against two independent evaluations, and its behaviour on difficult input."""

import copy
import json
import os

import lvis_oracle as oracle
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from evaluation_tools import classes_of, empty_sample, run, write

from mmdet_lt.errors import InputError
from mmdet_lt.evaluation.metrics.lvis_metric import LVISMetric
from mmdet_lt.statistics import ClassStatistics

NAMES = ['AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'APr', 'APc', 'APf', 'AR', 'ARs', 'ARm', 'ARl']


# ---- equality ---------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
@pytest.mark.parametrize(('seed', 'max_dets'), [(0, 300), (1, 300), (2, 8)])
def test_equals_the_obvious_evaluation(tmp_path, kind, seed, max_dets):
    data = oracle.make_data(seed, num_images=15)
    samples = oracle.make_samples(data, seed + 50)
    path = write(tmp_path / 'gt.json', data)
    values, metric = run(path, data, samples, metric=kind, max_dets=max_dets)
    rows = oracle.official_rows(data, samples, kind)
    expected, classes = oracle.evaluate(data, rows, kind, max_dets)
    assert set(values) == {f'lvis/{kind}_{name}' for name in NAMES}
    for name in NAMES:
        assert values[f'lvis/{kind}_{name}'] == pytest.approx(expected[name], abs=1e-12), name
        assert type(values[f'lvis/{kind}_{name}']) is float
    assert 0.05 < expected['AP'] < 0.95  # the comparison is about something
    rows = metric.details[kind]['classes']
    assert {row['name'] for row in rows} == set(classes)
    for row in rows:
        wanted = classes[row['name']]
        assert (row['ap'] is None) == (wanted is None)
        assert wanted is None or row['ap'] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_equals_lvis_api(tmp_path, kind, monkeypatch):
    lvis = pytest.importorskip('lvis')
    monkeypatch.setattr(np, 'float', float, raising=False)  # lvis 0.5.3 needs the removed name
    data = oracle.make_data(7, num_images=30)
    samples = oracle.make_samples(data, 8)
    path = write(tmp_path / 'gt.json', data)
    values, _ = run(path, data, samples, metric=kind)
    truth = lvis.LVIS(path)
    rows = lvis.LVISResults(truth, copy.deepcopy(oracle.official_rows(data, samples, kind)))
    official = lvis.LVISEval(truth, rows, kind)
    official.run()
    for name, value in official.get_results().items():
        assert values[f'lvis/{kind}_{name.split("@")[0]}'] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_equals_cocoeval_on_coco_format_with_crowds(tmp_path, kind):
    """Without federated fields every image counts for every class and crowds absorb."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data = oracle.make_data(3, num_images=30)
    for image in data['images']:
        del image['neg_category_ids'], image['not_exhaustive_category_ids']
    for category in data['categories']:
        del category['frequency']
    for i, annotation in enumerate(data['annotations']):
        annotation.pop('ignore', None)  # COCOeval overwrites it by iscrowd
        annotation['iscrowd'] = int(i % 6 == 0)
    samples = oracle.make_samples(data, 4)
    path = write(tmp_path / 'gt.json', data)
    values, _ = run(path, data, samples, metric=kind)
    truth = COCO(path)
    found = truth.loadRes(oracle.official_rows(data, samples, kind))
    official = COCOeval(truth, found, kind)
    official.evaluate()
    official.accumulate()
    official.summarize()
    names = ['AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', None, None, 'AR', 'ARs', 'ARm', 'ARl']
    for name, value in zip(names, official.stats, strict=True):
        if name:
            assert values[f'lvis/{kind}_{name}'] == pytest.approx(value, abs=1e-12), name
    assert values[f'lvis/{kind}_APr'] == -1  # nothing says which classes are rare


def test_hand_computed_values(tmp_path):
    """Two boxes; a hit, a miss, a hit by score: AP50 = 51/101 + 50/101 * 2/3."""
    box = [0.0, 0.0, 50.0, 50.0]
    other = [100.0, 100.0, 50.0, 50.0]
    data = dict(
        images=[dict(id=5, height=200, width=200, neg_category_ids=[],
                     not_exhaustive_category_ids=[])],
        categories=[dict(id=3, name='cat', frequency='r')],
        annotations=[dict(id=i, image_id=5, category_id=3, bbox=b, area=2500.0)
                     for i, b in ((1, box), (2, other))],
    )  # fmt: skip
    boxes = [[0, 0, 50, 50], [60, 60, 90, 90], [100, 100, 150, 150]]
    pred = dict(bboxes=torch.tensor(boxes).float(), scores=torch.tensor([0.92, 0.82, 0.72]),
                labels=torch.zeros(3, dtype=torch.int64))  # fmt: skip
    path = write(tmp_path / 'gt.json', data)
    values, metric = run(path, data, [dict(img_id=5, pred_instances=pred)])
    expected = 51 / 101 + 50 / 101 * 2 / 3
    assert values['lvis/bbox_APm'] == 1  # the miss is small (900 pixels)
    for name in ('AP', 'AP50', 'AP75', 'APr'):
        assert values[f'lvis/bbox_{name}'] == pytest.approx(expected, abs=1e-12)
    assert values['lvis/bbox_AR'] == 1 and values['lvis/bbox_APc'] == -1
    assert values['lvis/bbox_APs'] == -1
    calibration = metric.details['bbox']['calibration']
    assert calibration['bins'] == pytest.approx(np.linspace(0, 1, 21))
    assert sum(calibration['r']['count']) == 3
    assert calibration['r']['precision'][14] == 1 and calibration['r']['precision'][16] == 0
    assert calibration['r']['confidence'][16] == pytest.approx(0.82)
    assert metric.details['bbox']['pr']['r'][50:52] == pytest.approx([1, 2 / 3])


# ---- federated rules --------------------------------------------------------------------------


def test_detections_of_unjudged_classes_do_not_count(set_up):
    path, data, samples = set_up
    values, _ = run(path, data, samples)
    position = {category['id']: i for i, category in enumerate(data['categories'])}
    noisy = copy.deepcopy(samples)
    for sample, image in zip(noisy, data['images'], strict=True):
        present = {a['category_id'] for a in data['annotations'] if a['image_id'] == image['id']}
        free = set(position) - present - set(image['neg_category_ids'])
        labels = torch.tensor([position[c] for c in sorted(free)] * 5)
        pred = sample['pred_instances']
        pred['labels'] = torch.cat([pred['labels'], labels])
        pred['scores'] = torch.cat([pred['scores'], torch.ones(len(labels))])
        pred['bboxes'] = torch.cat([pred['bboxes'], torch.tensor([[0, 0, 9.0, 9]] * len(labels))])
    assert run(path, data, noisy)[0] == values
    # ... but they use up places among the best detections of an image
    assert run(path, data, noisy, max_dets=20)[0]['lvis/bbox_AP'] < values['lvis/bbox_AP']


def test_area_of_masks_comes_from_the_mask(tmp_path):
    """An 80x80 triangle-like mask of 300 pixels is small, whatever its box."""
    mask = np.zeros((100, 100), dtype=np.uint8)
    mask[np.arange(80), np.arange(80)] = 1
    mask[0, :80] = mask[:80, 79] = 1
    data = dict(
        images=[dict(id=1, height=100, width=100, neg_category_ids=[1],
                     not_exhaustive_category_ids=[])],
        categories=[dict(id=1, name='a', frequency='f')],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[90, 90, 5, 5], area=25,
                          segmentation=[[90, 90, 95, 90, 95, 95, 90, 95]])],
    )  # fmt: skip
    hit = np.zeros_like(mask)
    hit[90:95, 90:95] = 1
    pred = dict(
        bboxes=torch.tensor([[0, 0, 80, 80], [90, 90, 95, 95.0]]),
        scores=torch.tensor([0.9, 0.8]),
        labels=torch.zeros(2, dtype=torch.int64),
        masks=torch.from_numpy(np.stack([mask, hit])),
    )
    path = write(tmp_path / 'gt.json', data)
    values, _ = run(path, data, [dict(img_id=1, pred_instances=pred)], metric='segm')
    # the false mask is within the small range, so it lowers the precision there to 1/2
    assert values['lvis/segm_APs'] == pytest.approx(0.5)


# ---- classes, groups, images ------------------------------------------------------------------


def test_labels_follow_names_not_file_order(set_up):
    path, data, samples = set_up
    expected, _ = run(path, data, samples)
    order = np.random.default_rng(0).permutation(len(data['categories']))
    inverse = torch.tensor(np.argsort(order))
    moved = copy.deepcopy(samples)
    for sample in moved:
        sample['pred_instances']['labels'] = inverse[sample['pred_instances']['labels']]
    classes = [classes_of(data)[i] for i in order]
    assert run(path, data, moved, classes)[0] == expected
    values, metric = run(path, data, moved, classes, sort_categories=False)
    assert [row['name'] for row in metric.details['bbox']['classes']] == classes
    assert values['lvis/bbox_AP'] == pytest.approx(expected['lvis/bbox_AP'], abs=1e-12)


def test_misspelt_lvis_name_is_recognised(set_up, tmp_path):
    """LVIS v1 says 'stero', MMDetection's class list 'stereo'."""
    _, data, samples = set_up
    data['categories'][2]['name'] = 'speaker_(stero_equipment)'
    classes = classes_of(data)
    path = write(tmp_path / 'typo.json', data)
    expected, _ = run(path, data, samples, classes)
    classes[2] = 'speaker_(stereo_equipment)'
    statistics = ClassStatistics(classes, [3] * 9, [4] * 9, 10)
    assert run(path, data, samples, classes, class_statistics=statistics)[0] == expected


@pytest.mark.parametrize('as_file', [True, False])
def test_groups_from_training_statistics(set_up, tmp_path, as_file):
    path, data, samples = set_up
    expected, _ = run(path, data, samples)
    groups = [category.pop('frequency') for category in data['categories']]
    count = [dict(r=4, c=40, f=400)[group] for group in groups]
    statistics = ClassStatistics(classes_of(data), count, count, 1000)
    statistics = statistics.align(classes_of(data)[::-1])
    if as_file:
        statistics.save(tmp_path / 'statistics.json')
        statistics = str(tmp_path / 'statistics.json')
    plain = write(tmp_path / 'plain.json', data)
    values, metric = run(plain, data, samples, class_statistics=statistics)
    assert values == expected
    by_name = dict(zip(classes_of(data), count, strict=True))
    assert all(
        row['image_count'] == by_name[row['name']] for row in metric.details['bbox']['classes']
    )
    # the file's own groups win, so that LVIS stays LVIS
    wrong = ClassStatistics(classes_of(data), [4] * 9, [4] * 9, 1000)
    assert run(path, data, samples, class_statistics=wrong)[0] == expected


def test_without_groups_a_warning_and_minus_one(set_up, tmp_path, warnings):
    _, data, samples = set_up
    for category in data['categories']:
        del category['frequency']
    values, _ = run(write(tmp_path / 'plain.json', data), data, samples)
    assert [values[f'lvis/bbox_AP{g}'] for g in 'rcf'] == [-1, -1, -1]
    assert values['lvis/bbox_AP'] > 0
    assert any('frequency group' in message for message in warnings)


def test_subset_of_classes_is_evaluated_alone(set_up, warnings):
    path, data, samples = set_up
    full, metric = run(path, data, samples)
    keep = [1, 4, 6]
    subset = copy.deepcopy(samples)
    for sample in subset:
        pred = sample['pred_instances']
        mask = torch.isin(pred['labels'], torch.tensor(keep))
        for key in list(pred):
            pred[key] = pred[key][mask]
        pred['labels'] = torch.tensor([keep.index(i) for i in pred['labels'].tolist()])
    classes = [classes_of(data)[i] for i in keep]
    values, part = run(path, data, subset, classes)
    ap = {row['name']: row['ap'] for row in metric.details['bbox']['classes']}
    assert {row['name']: row['ap'] for row in part.details['bbox']['classes']} == {
        name: ap[name] for name in classes
    }
    assert values['lvis/bbox_AP'] == pytest.approx(np.mean([ap[name] for name in classes]))
    assert any(message.startswith('6 of the 9 categories') for message in warnings)


def test_subset_of_images_is_evaluated_alone(set_up, tmp_path, warnings):
    path, data, samples = set_up
    values, _ = run(path, data, samples[:10])
    few = copy.deepcopy(data)
    few['images'] = few['images'][:10]
    kept = {image['id'] for image in few['images']}
    few['annotations'] = [a for a in few['annotations'] if a['image_id'] in kept]
    assert values == run(write(tmp_path / 'few.json', few), few, samples[:10])[0]
    assert any('10 of the 25 images' in message for message in warnings)


# ---- empty input, padding, ranks --------------------------------------------------------------


@pytest.mark.parametrize('processed', [True, False])
def test_no_prediction_gives_zero_and_all_keys(set_up, processed):
    path, data, _ = set_up
    samples = [empty_sample(image['id']) for image in data['images']] if processed else []
    values, _ = run(path, data, samples, metric=['bbox', 'segm'])
    assert set(values) == {f'lvis/{k}_{name}' for k in ('bbox', 'segm') for name in NAMES}
    assert all(value == 0 for value in values.values()), values


def test_padding_and_duplicates_are_scored_once(set_up):
    path, data, samples = set_up
    expected, _ = run(path, data, samples)
    # the sampler repeats the first images; the size of the data set cuts them
    assert run(path, data, samples + samples[:3], size=len(samples))[0] == expected
    # duplicates that survive the cut
    assert run(path, data, samples + samples[:3])[0] == expected


def test_order_of_images_does_not_matter(set_up):
    path, data, samples = set_up
    assert run(path, data, samples[::-1])[0] == run(path, data, samples)[0]


def _rank(rank, path, data, samples, folder, fail):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=fail[1], RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    metric = LVISMetric(path, collect_dir=os.path.join(folder, 'collect'))
    classes = classes_of(data)
    if fail[0] and rank == 0:
        classes = ['unknown', *classes[1:]]
    metric.dataset_meta = dict(classes=classes)
    padded = samples + samples[: len(samples) % 2]
    metric.process({}, padded[rank::2])
    try:
        out = metric.evaluate(len(samples))
    except InputError as error:
        out = str(error)
    loaded = metric._truth is not None
    with open(os.path.join(folder, f'{rank}.json'), 'w') as file:
        json.dump([out, loaded], file)
    torch.distributed.barrier()
    os._exit(0)  # destroying a gloo group can abort the process while its threads finish


@pytest.mark.parametrize('fail', [False, True])
def test_two_ranks(set_up, tmp_path, fail):
    """Same values on both ranks, annotations read by rank 0 only, errors raised on both."""
    import socket

    path, data, samples = set_up
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    args = (path, data, samples, str(tmp_path), (fail, port))
    mp.start_processes(_rank, args, nprocs=2, start_method='fork')
    (first, loaded), (second, loaded_too) = (
        json.loads((tmp_path / f'{rank}.json').read_text()) for rank in (0, 1)
    )
    assert loaded and not loaded_too
    assert first == second
    if fail:
        assert "'unknown'" in first
    else:
        assert len(samples) % 2 == 1
        assert first == run(path, data, samples)[0]


# ---- output -----------------------------------------------------------------------------------


def test_detail_file_and_table(set_up, tmp_path):
    path, data, samples = set_up
    target = tmp_path / 'out' / 'lvis_detail.json'
    values, _ = run(path, data, samples, detail_file=target, classwise=True, prefix='val')
    detail = json.loads(target.read_text())
    assert detail['format'] == 'mmdet_lt.lvis_detail.v1' and 'segm' not in detail
    box = detail['bbox']
    assert box['overall']['AP'] == values['val/bbox_AP']
    row = box['classes'][0]
    assert set(row) == {'name', 'group', 'image_count', 'instance_count', 'num_gt', 'ap', 'ap50',
                        'ap75', 'ar'}  # fmt: skip
    assert values[f'val/bbox_{row["name"]}_precision'] == row['ap']
    valid = [r['ap'] for r in box['classes'] if r['ap'] is not None and r['group'] == 'r']
    assert np.mean(valid) == pytest.approx(values['val/bbox_APr'], abs=1e-12)
    assert len(box['pr']['recall']) == 101 == len(box['pr']['r'])
    curves = [p for group in 'rcf' for p in box['pr'][group]]
    assert 0 <= min(curves) and max(curves) <= 1
    bins = len(box['calibration']['bins']) - 1
    assert all(len(box['calibration'][g]['count']) == bins for g in 'rcf')


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_written_predictions_are_the_official_format(set_up, tmp_path, kind):
    path, data, samples = set_up
    prefix = str(tmp_path / 'submit')
    values, _ = run(path, data, samples, metric=kind, outfile_prefix=prefix, format_only=True)
    assert values == {}
    rows = json.loads((tmp_path / f'submit.{kind}.json').read_text())
    key = 'segmentation' if kind == 'segm' else 'bbox'
    assert set(rows[0]) == {'image_id', 'category_id', 'score', key}
    direct, _ = oracle.evaluate(data, oracle.official_rows(data, samples, kind), kind)
    assert oracle.evaluate(data, rows, kind)[0] == pytest.approx(direct, abs=1e-12)


def test_builds_from_a_config_and_keeps_rle_input(set_up):
    from mmdet_lt.evaluation.predictions import encode_masks
    from mmdet_lt.registry import METRICS

    path, data, samples = set_up
    metric = METRICS.build(dict(type='mmdet_lt.LVISMetric', ann_file=path, metric='segm'))
    assert type(metric) is LVISMetric
    expected, _ = run(path, data, samples, metric='segm')
    for sample in samples:
        pred = sample['pred_instances']
        pred['masks'] = encode_masks(pred['masks'].numpy(), np.arange(len(pred['masks'])))
    assert run(path, data, samples, metric='segm')[0] == expected


def test_inside_the_evaluator_with_data_samples(set_up):
    """The path of a real run: `DetDataSample` in an `Evaluator`."""
    from mmdet.structures import DetDataSample
    from mmengine.evaluator import Evaluator
    from mmengine.structures import InstanceData

    path, data, samples = set_up
    expected, _ = run(path, data, samples, metric=['bbox', 'segm'])
    evaluator = Evaluator(
        dict(type='mmdet_lt.LVISMetric', ann_file=path, metric=['bbox', 'segm'], prefix='lvis')
    )
    evaluator.dataset_meta = dict(classes=tuple(classes_of(data)))
    for sample in samples:
        item = DetDataSample(metainfo=dict(img_id=sample['img_id'], ori_shape=(160, 160)))
        item.pred_instances = InstanceData(**sample['pred_instances'])
        evaluator.process([item], {})
    assert evaluator.evaluate(len(samples)) == expected
