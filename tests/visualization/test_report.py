"""The HTML report: what it says about complete, partial and damaged work directories."""

import base64
import importlib.util
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdet_lt.errors import InputError
from mmdet_lt.statistics import ClassStatistics
from mmdet_lt.visualization import figures, write_report
from mmdet_lt.visualization.examples import box_iou, draw, judge
from mmdet_lt.visualization.runs import load_run

FIGURES = 6  # classes, groups, precision-recall, calibration, gradient ratio, loss


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Drawing takes most of the time of these tests, and most of that depends on the pixels."""
    monkeypatch.setattr('mmdet_lt.visualization.report._DPI', 50)


def make_detail(seed, gain=0.0, num_classes=40):
    rng = np.random.default_rng(seed)
    images = np.round(2000 * np.exp(-0.19 * np.arange(num_classes))).astype(int) + 1
    groups = np.where(images <= 10, 'r', np.where(images <= 100, 'c', 'f'))
    base = dict(r=0.12 + gain, c=0.28 + gain / 2, f=0.5)
    ap = [float(np.clip(base[g] + rng.normal(0, 0.07), 0, 1)) for g in groups]
    recall = np.linspace(0, 1, 101)
    mean = {
        g: float(np.mean([a for a, h in zip(ap, groups, strict=True) if h == g])) for g in 'rcf'
    }
    overall = dict(AP=float(np.mean(ap)), AP50=0.6, AP75=0.4, APs=-1.0, APm=0.4, APl=0.5, AR=0.6)
    overall.update({f'AP{g}': mean[g] for g in 'rcf'})
    edges = np.linspace(0, 1, 21)
    centre = (edges[1:] + edges[:-1]) / 2
    calibration = dict(bins=edges.tolist())
    for g, bend in zip('rcf', (2.5, 1.6, 1.1), strict=True):
        count = (4000 * np.exp(-4 * centre)).astype(int)
        calibration[g] = dict(
            count=count.tolist(),
            confidence=centre.tolist(),
            precision=[*(centre ** (bend - gain)).tolist()[:-1], None],
        )
        calibration[g]['count'][-1] = 0
        calibration[g]['confidence'][-1] = None
    return dict(
        format='mmdet_lt.lvis_detail.v1',
        bbox=dict(
            overall=overall,
            classes=[
                dict(name=f'class {i}', group=str(groups[i]), image_count=int(images[i]),
                     instance_count=int(2 * images[i]), num_gt=5, ap=None if i == 7 else ap[i],
                     ap50=0.5, ap75=0.4, ar=0.6)
                for i in range(num_classes)
            ],
            pr=dict(recall=recall.tolist(),
                    **{g: np.clip(1.1 * mean[g] + 0.4 - recall, 0, 1).tolist() for g in 'rcf'}),
            calibration=calibration,
        ),
    )  # fmt: skip


def make_run(folder, seed=0, gain=0.0, leave_out=()):
    """A work directory as training leaves it, files in sub-folders."""
    rng = np.random.default_rng(seed)
    logs = folder / '20250101_000000' / 'vis_data'
    logs.mkdir(parents=True)
    lines = []
    for i in range(1, 101):
        line = dict(lr=0.01, loss=3 / np.sqrt(i) + rng.normal(0, 0.03), iter=10 * i, step=10 * i)
        if 'grad_ratio' not in leave_out:
            for g, start in zip('rcf', (0.01, 0.08, 0.6), strict=True):
                line[f'grad_ratio_{g}'] = start * (1 + i / 25 * (1 + 8 * gain))
        lines.append(json.dumps(line))
    lines.append(json.dumps({'lvis/bbox_AP': 0.25, 'lvis/bbox_APr': 0.1, 'step': 1000}))
    (logs / 'scalars.json').write_text(
        '\n'.join(lines) + '\n{"loss": 1.0, "it'
    )  # killed while writing
    if 'detail' not in leave_out:
        (folder / 'lvis_detail.json').write_text(json.dumps(make_detail(seed, gain)))
    if 'result' not in leave_out:
        (folder / 'result.json').write_text(json.dumps({'seconds': 1234.5}))
    if 'examples' not in leave_out:
        (folder / 'examples').mkdir()
        examples = []
        for i in range(3):
            pixels = rng.integers(90, 200, (120, 160, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / 'examples' / f'{i}.png')
            gt = [dict(bbox=[10, 20, 70, 80], label='dragonfly', group='r'),
                  dict(bbox=[90, 30, 150, 110], label='tambourine', group='r')]  # fmt: skip
            pred = [dict(bbox=[12, 22, 70, 82], label='dragonfly', score=0.81, group='r'),
                    dict(bbox=[90, 32, 148, 108], label='drum', score=0.4, group='f')]  # fmt: skip
            examples.append(dict(image=f'examples/{i}.png', gt=gt, pred=pred))
        examples.append(dict(image='examples/moved.png', gt=gt, pred=[]))
        (folder / 'examples.json').write_text(json.dumps(examples))
    return folder


def images_of(page):
    """Decoded figures of a page by their description."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]+)"', page)
    return {alt: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for alt, data in found}


def missing_of(page):
    return re.findall(r'<p class="missing">(.*?)</p>', page)


def test_complete_report_is_one_self_contained_page(tmp_path):
    runs = {
        'cross <entropy>': make_run(tmp_path / 'a'),
        'seesaw': make_run(tmp_path / 'b', 1, 0.1),
    }
    out = write_report(runs, tmp_path / 'out' / 'report.html', title='Glyph & LVIS')
    page = out.read_text()
    assert missing_of(page) == []
    pictures = images_of(page)
    assert len(pictures) == FIGURES + 2  # examples of each run
    for name, pixels in pictures.items():
        assert pixels.shape[1] == 480 and pixels[..., :3].std() > 5, name
    # nothing is loaded from elsewhere, and labels cannot break the page
    assert not re.search(r'(src|href)="(?!data:)', page) and '<script' not in page
    assert 'cross &lt;entropy&gt;' in page and '<entropy>' not in page
    assert '<title>Glyph &amp; LVIS</title>' in page


def test_table_holds_the_results_and_marks_the_best(tmp_path):
    runs = {
        'a': make_run(tmp_path / 'a'),
        'b': make_run(tmp_path / 'b', 1, 0.1, leave_out=('result',)),
    }
    page = write_report(runs, tmp_path / 'r.html').read_text()
    rows = re.findall(r'<tr>(.*?)</tr>', page)[1:]
    cells = [re.findall(r'<td(?: class="best")?>(.*?)</td>', row) for row in rows]
    for row, seed, gain in ((cells[0], 0, 0.0), (cells[1], 1, 0.1)):
        overall = make_detail(seed, gain)['bbox']['overall']
        expected = [f'{100 * overall[key]:.2f}' for key in ('AP', 'AP50', 'APr', 'APc', 'APf')]
        assert row[1:6] == expected
    assert cells[0][6] == '1,234' or cells[0][6] == '1,235'
    assert cells[1][6] == '–'
    a, b = (make_detail(s, g)['bbox']['overall']['APr'] for s, g in ((0, 0.0), (1, 0.1)))
    assert b > a and f'<td class="best">{100 * b:.2f}</td>' in rows[1]
    assert f'<td class="best">{100 * a:.2f}</td>' not in rows[0]


@pytest.mark.parametrize(
    ('leave_out', 'figures_left', 'sentence'),
    [
        (('grad_ratio',), FIGURES, 'grad_ratio_r'),
        (('examples',), FIGURES, 'no run has examples.json'),
        (('result',), FIGURES + 1, None),
        (('detail',), 4, 'lvis_detail.json'),
    ],
)
def test_missing_input_becomes_a_sentence(tmp_path, leave_out, figures_left, sentence):
    run = make_run(tmp_path / 'run', leave_out=leave_out)
    page = write_report({'run': run}, tmp_path / 'r.html').read_text()
    assert len(images_of(page)) == figures_left
    sentences = missing_of(page)
    assert (sentence is None and not sentences) or any(sentence in text for text in sentences)
    if leave_out == ('detail',):  # the last validation in the log still gives the table and bars
        assert '<td>25.00</td>' in page and 'AP by frequency group' in images_of(page)


def test_run_without_an_input_is_named_and_colours_stay(tmp_path):
    full = make_run(tmp_path / 'full')
    part = make_run(tmp_path / 'part', 1, leave_out=('grad_ratio', 'examples'))
    page = write_report({'part': part, 'full': full}, tmp_path / 'r.html').read_text()
    assert any('Not shown: part' in text for text in missing_of(page))
    colours = re.findall(r'class="chip" style="background:(#\w+)"', page)
    assert colours == list(figures.RUN_COLOURS[:2])
    pixels = images_of(page)['Gradient ratio over time'][..., :3].reshape(-1, 3)
    second = np.array([int(figures.RUN_COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)])
    assert (pixels == second).all(axis=1).sum() > 20  # `full` is the second run here as well


def test_empty_and_damaged_folders_do_not_stop_the_report(tmp_path):
    empty, broken = tmp_path / 'empty', tmp_path / 'broken'
    empty.mkdir()
    broken.mkdir()
    for name in ('lvis_detail.json', 'result.json', 'examples.json'):
        (broken / name).write_text('{"bbox": [')
    (broken / 'scalars.json').write_text('no json\n\n[1]\n')
    strange = make_run(tmp_path / 'strange')
    detail = make_detail(0)
    detail['bbox']['calibration']['r'] = dict(count=[1])
    (strange / 'lvis_detail.json').write_text(json.dumps(detail))
    (strange / 'examples.json').write_text('[{"image": "examples/0.png", "pred": [{}]}]')
    page = write_report({'e': empty, 'b': broken}, tmp_path / 'r.html').read_text()
    assert not images_of(page)
    assert sum('not complete JSON' in text for text in missing_of(page)) == 3
    page = write_report({'s': strange}, tmp_path / 's.html').read_text()
    assert sum('malformed' in text for text in missing_of(page)) == 2
    assert len(images_of(page)) == FIGURES - 1


def test_wrong_arguments(tmp_path):
    with pytest.raises(InputError, match='does not exist'):
        write_report({'x': tmp_path / 'nothing'}, tmp_path / 'r.html')
    with pytest.raises(InputError, match='at least one'):
        write_report({}, tmp_path / 'r.html')


def test_statistics_replace_the_counts_of_the_detail_file(tmp_path):
    run = make_run(tmp_path / 'run')
    detail = make_detail(0)
    for row in detail['bbox']['classes']:
        row['image_count'] = row['group'] = None
    (run / 'lvis_detail.json').write_text(json.dumps(detail))
    page = write_report({'run': run}, tmp_path / 'r.html').read_text()
    assert any('training counts' in text for text in missing_of(page))
    names = [row['name'] for row in detail['bbox']['classes']]
    statistics = ClassStatistics(names, [50] * 40, [50] * 40, 1000)
    page = write_report({'run': run}, tmp_path / 'r.html', statistics).read_text()
    assert 'Classes and their AP' in images_of(page)


def test_log_over_a_restart_counts_each_iteration_once(tmp_path):
    """The later run of an iteration wins; other runs of the folder are not mixed in."""
    for folder, lines in (
        ('seed0/20250101_000000', [(1, 5.0), (2, 4.0), (3, 9.0)]),
        ('seed0/20250102_000000', [(3, 3.0), (4, 2.0)]),
        ('seed1/20240101_000000', [(1, 77.0)]),
    ):
        path = tmp_path / folder / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        path.write_text('\n'.join(json.dumps(dict(iter=i, loss=v)) for i, v in lines))
    newest = tmp_path / 'seed0/20250102_000000/vis_data/scalars.json'
    old = tmp_path / 'seed1/20240101_000000/vis_data/scalars.json'
    os.utime(old, (1, 1))
    os.utime(newest, (2e9, 2e9))
    steps, loss = load_run('x', tmp_path).curve('loss')
    assert steps.tolist() == [1, 2, 3, 4] and loss.tolist() == [5, 4, 3, 2]


def test_judge_hits_and_misses():
    gts = [dict(bbox=[0, 0, 10, 10], label='a'), dict(bbox=[20, 0, 30, 10], label='b')]
    preds = [
        dict(bbox=[0, 0, 10, 9], label='a', score=0.5),  # late: its box is taken
        dict(bbox=[0, 0, 10, 10], label='a', score=0.9),
        dict(bbox=[20, 0, 30, 10], label='a', score=0.8),  # another class
        dict(bbox=[26, 0, 36, 10], label='b', score=0.7),  # IoU 4/16
    ]
    assert judge(gts, preds) == ([False, True, False, False], [True, False])
    assert box_iou([20, 0, 30, 10], [26, 0, 36, 10]) == pytest.approx(0.25)
    assert box_iou([0, 0, 1, 1], [1, 1, 2, 2]) == 0
    example = dict(pixels=np.zeros((40, 40, 3), np.uint8), gt=[dict(gts[1], group='r')], pred=preds)
    texts = [text.get_text() for text in draw([example]).axes[0].texts]
    assert sum(text.startswith('✗') for text in texts) == 4 and texts[-1] == 'missed b'


def test_running_mean_and_styles():
    mean = figures._running_mean(np.array([1.0, np.nan, 3.0, 5.0]), 3)
    assert mean == pytest.approx([1, 2, 4, 4])
    looks = [tuple(figures.style(i).items()) for i in range(28)]
    assert len(set(looks)) == 28


@pytest.fixture
def tool():
    path = Path(__file__).parents[2] / 'tools' / 'analysis' / 'report.py'
    spec = importlib.util.spec_from_file_location('report_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line(tmp_path, tool, capsys):
    make_run(tmp_path / 'x' / 'run')
    make_run(tmp_path / 'y' / 'run', 1)
    out = tmp_path / 'page.html'
    args = [str(tmp_path / 'x' / 'run'), str(tmp_path / 'y' / 'run'), f'best={tmp_path / "x"}']
    tool.main([*args, '--out', str(out)])
    page = out.read_text()
    assert 'x/run, y/run, best' in page and str(out) in capsys.readouterr().out
    with pytest.raises(InputError, match='LABEL=PATH'):
        tool.label_runs(['a=1', 'a=2'])
