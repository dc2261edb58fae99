"""The preview of a sampler: printed numbers, files, all samplers, bad input."""

import csv
import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from tool_helpers import load_tool
from toy import make_toy_coco, write_toy_config

from mmdet_lt import ClassStatistics
from mmdet_lt.engine.launch import run_cli
from mmdet_lt.visualization import sampling

SAMPLERS = {
    'rfs': dict(type='mmdet_lt.RepeatFactorSampler', repeat_thr=0.9),
    'irfs': dict(type='mmdet_lt.InstanceAwareRepeatFactorSampler', repeat_thr=0.9),
    'balanced': dict(type='mmdet_lt.ClassBalancedSampler'),
    'root': dict(type='mmdet_lt.SquareRootSampler', max_repeats=3),
    'progressive': dict(type='mmdet_lt.ProgressivelyBalancedSampler', max_epochs=4),
    'stock': dict(type='DefaultSampler', shuffle=True),
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Twelve images: class_0 in all, twice in the first; class_1 in four; class_2 in one."""
    folder = tmp_path_factory.mktemp('preview')
    path = make_toy_coco(folder, num_images=12, boxes_per_image=2)
    content = json.loads(path.read_text())
    for number, annotation in enumerate(content['annotations']):
        image, second = divmod(number, 2)
        annotation['category_id'] = 1
        annotation['iscrowd'] = int(second and image not in (0, 1, 2, 3, 4, 5))
        if second and image in (1, 2, 3, 4):
            annotation['category_id'] = 2
        if second and image == 5:
            annotation['category_id'] = 3
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def preview(capsys, data, tmp_path, monkeypatch):
    """Call the tool on a sampler: status, standard output, standard error."""
    monkeypatch.setenv('LOCAL_RANK', '0')

    def run(sampler, *options):
        extra = f"train_dataloader['sampler'] = {sampler!r}\n"
        extra += "custom_imports = dict(imports=['mmdet_lt'])\n"
        config = write_toy_config(tmp_path / 'cfg.py', data, extra=extra)
        capsys.readouterr()
        words = [str(config), '--out', str(tmp_path / 'out'), *options]
        status = run_cli(load_tool('analysis/sampling_preview').main, words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def table(path):
    with open(path / 'out' / 'sampling.csv', encoding='utf-8') as file:
        return {row['class']: row for row in csv.DictReader(file)}


@pytest.mark.parametrize('name', list(SAMPLERS))
def test_all_samplers(preview, tmp_path, name):
    status, out, err = preview(SAMPLERS[name])
    assert status == 0, err
    rows = table(tmp_path)
    before = {c: (int(r['images_before']), int(r['instances_before'])) for c, r in rows.items()}
    assert before == dict(class_0=(12, 13), class_1=(4, 4), class_2=(1, 1))
    for row in rows.values():
        for kind in ('images', 'instances'):
            drawn, expected = (float(row[f'{kind}_{s}']) for s in ('drawn', 'expected'))
            assert abs(drawn - expected) <= 4
    if name == 'stock':
        assert rows['class_2']['images_drawn'] == rows['class_2']['images_expected'] == '1'
        assert 'repeats: 0.0% of the draws expected, 0.0% drawn' in out
    else:
        share = float(rows['class_2']['images_expected']) / float(
            rows['class_0']['images_expected']
        )
        assert share > 1 / 12
    assert (tmp_path / 'out' / 'sampling.png').stat().st_size > 10_000
    assert re.search(r'^rare +2 ', out, re.M) and re.search(r'^common +1 ', out, re.M)


def test_class_balanced_numbers_by_hand(preview, tmp_path):
    """P = 1/36 for all, + 1/12 for the four images of class_1, + 1/3 for that of class_2."""
    status, out, _ = preview(SAMPLERS['balanced'])
    assert status == 0
    rows = table(tmp_path)
    assert float(rows['class_2']['images_expected']) == pytest.approx(12 * (1 / 36 + 1 / 3), 1e-4)
    assert float(rows['class_1']['images_expected']) == pytest.approx(12 * 4 / 9, 1e-4)
    assert float(rows['class_0']['images_expected']) == pytest.approx(12, 1e-4)
    first = out.split('most repeated images:\n')[1].splitlines()[0]
    assert re.match(r' +[45] x \(expected 4\.33\)  .*0006\.png: class_2, class_0', first)
    # The rarest class is printed first; --classes limits the list.
    status, out, _ = preview(SAMPLERS['balanced'], '--classes', '1')
    assert 'and 2 more frequent classes' in out and 'class_1 ' not in out.split('repeats:')[0]


def test_the_epoch_asked_for_is_drawn(preview, tmp_path):
    tables = []
    for epoch in ('0', '0', '3'):
        preview(SAMPLERS['progressive'], '--epoch', epoch)
        tables.append(table(tmp_path)['class_2'])
    assert tables[0] == tables[1]
    # At a quarter of the way the image of class_2 has 3/4 of 2/17 and 1/4 of 13/36 of 12 draws.
    assert float(tables[0]['images_expected']) == pytest.approx(12 * (1.5 / 17 + 13 / 144), 1e-4)
    assert float(tables[2]['images_expected']) == pytest.approx(12 * 13 / 36, 1e-4)


@pytest.mark.parametrize(
    'sampler, options, words',
    [
        (dict(type='InfiniteSampler'), (), ['DefaultSampler', 'found InfiniteSampler']),
        (SAMPLERS['rfs'], ('--epoch', '-1'), ['--epoch counts from 0']),
        (dict(SAMPLERS['rfs'], repeat_thr=2), (), ['repeat_thr', 'found 2']),
        (None, (), ['train_dataloader', 'sampler', 'found none']),
    ],
)
def test_bad_input(preview, tmp_path, sampler, options, words):
    status, _, err = preview(sampler, *options)
    assert status == 2
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith('error: ') and 'Traceback' not in err
    for word in words:
        assert word in sentence
    assert not (tmp_path / 'out').exists()


def test_many_classes_without_boxes_are_drawn():
    """A long-tailed set with absent classes still gives a figure."""
    count = np.r_[np.arange(1, 900), np.zeros(301)].astype(int)
    stats = ClassStatistics([f'c{i}' for i in range(1200)], count, count, 1000)
    values = {state: count.astype(float) for state in sampling.STATES}
    draws = {state: np.ones(1000) for state in sampling.STATES}
    summary = sampling.SamplingSummary(stats, draws, values, values)
    figure = sampling.sampling_figure(summary, 'title')
    assert isinstance(figure, Figure) and len(figure.axes[0].lines[0].get_xdata()) == 1200
    assert summary.repeats['drawn'] == 0
