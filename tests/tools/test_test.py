"""tools/test.py on the toy task."""

from __future__ import annotations

import pickle

import pytest
from mmengine.config import Config
from tool_helpers import load_tool, run_tool


def test_out_holds_one_prediction_per_image(toy, trained, tmp_path):
    words = ('tools/test.py', toy.config, trained / 'epoch_2.pth', '--work-dir', 'run')
    done = run_tool(*words, '--out', 'x.pkl', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'coco/bbox_mAP' in done.stdout
    with open(tmp_path / 'x.pkl', 'rb') as file:
        results = pickle.load(file)
    assert sorted(result['img_id'] for result in results) == list(range(1, 9))
    assert all(len(result['pred_instances']['bboxes']) == 20 for result in results)


def test_tta_uses_the_limits_of_the_model(toy, trained, tmp_path):
    """Two views of 20 boxes merge to at most the model's 7, not to MMDetection's 100."""
    words = ('tools/test.py', toy.config, trained / 'epoch_2.pth', '--work-dir', 'run', '--tta')
    options = ('--out', 'x.pkl', '--cfg-options', 'model.test_cfg.max_per_img=7')
    done = run_tool(*words, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'flip test' in done.stdout
    with open(tmp_path / 'x.pkl', 'rb') as file:
        results = pickle.load(file)
    assert {len(result['pred_instances']['bboxes']) for result in results} == {7}


def test_tta_config():
    tool = load_tool('test')
    nms = dict(type='soft_nms', iou_threshold=0.3)
    two_stage = dict(rpn=dict(max_per_img=1000), rcnn=dict(nms=nms, max_per_img=300))
    assert tool.merge_settings(two_stage) == dict(nms=nms, max_per_img=300)
    assert tool.merge_settings(dict(nms=nms, max_per_img=5))['max_per_img'] == 5
    assert tool.merge_settings({})['max_per_img'] == 100

    pipeline = [dict(type='Load'), dict(type='PackDetInputs', meta_keys=('img_id',))]
    cfg = Config(
        dict(
            model=dict(type='M', test_cfg=two_stage),
            test_dataloader=dict(dataset=dict(type='W', dataset=dict(pipeline=pipeline))),
        )
    )
    tool.apply_tta(cfg)
    assert cfg.model.type == 'DetTTAModel' and cfg.model.module.type == 'M'
    assert cfg.model.tta_cfg.max_per_img == 300
    inner = cfg.test_dataloader.dataset.dataset.pipeline
    assert [step.type for step in inner] == ['Load', 'TestTimeAug']
    assert {'img_id', 'flip', 'flip_direction'} <= set(inner[-1].transforms[1][0].meta_keys)

    own = dict(type='DetTTAModel', tta_cfg=dict(nms=nms, max_per_img=9))
    cfg = Config(dict(cfg.to_dict(), model=dict(type='M'), tta_model=own))
    tool.apply_tta(cfg)
    assert cfg.model.tta_cfg.max_per_img == 9


@pytest.mark.parametrize(
    ('checkpoint', 'options', 'parts'),
    [
        ('missing.pth', [], ['missing.pth', 'found nothing']),
        ('truncated.pth', [], ['truncated.pth', 'truncated']),
        ('epoch_1.pth', ['--out', 'x.json'], ['--out', '.pkl', 'x.json']),
        (
            'epoch_1.pth',
            ['--show-dir', 'x', '--cfg-options', 'default_hooks.visualization=None'],
            ['--show-dir'],
        ),
        ('epoch_1.pth', ['--cfg-options', 'test_dataloader=None'], ['`test_dataloader`']),
    ],
)
def test_bad_input(checkpoint, options, parts, toy, trained, call, tmp_path):
    whole = (trained / 'epoch_1.pth').read_bytes()
    (tmp_path / 'epoch_1.pth').write_bytes(whole)
    (tmp_path / 'truncated.pth').write_bytes(whole[:-100])
    words = (toy.config, tmp_path / checkpoint, '--work-dir', tmp_path / 'run')
    status, lines = call('test', *words, *options)
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith('error: ')
    for part in parts:
        assert part in lines[0]
    assert not (tmp_path / 'run').exists()
