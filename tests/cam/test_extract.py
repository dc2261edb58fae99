"""Extraction on toy data: contents, resuming, ranks, odd annotation files, wrong input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cam_toy import cam_config, make_toy_coco, save_checkpoint

from mmdet_lt.cam import extract
from mmdet_lt.cam.gradcam import box_cams
from mmdet_lt.cam.masks import foreground, resample
from mmdet_lt.cam.store import CAMFile
from mmdet_lt.errors import InputError


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toy')
    make_toy_coco(folder, num_images=7, boxes_per_image=2)
    cfg = cam_config(folder)
    return folder, cfg, str(save_checkpoint(cfg, folder / 'a.pth'))


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """The file of one uninterrupted extraction."""
    _, cfg, checkpoint = data
    out = tmp_path_factory.mktemp('whole') / 'one.cams'
    return extract.extract_cams(cfg, checkpoint, out, batch_size=2)


def test_contents(data, whole):
    folder, cfg, checkpoint = data
    cams = CAMFile(whole)
    annotations = json.loads((folder / 'train.json').read_text())['annotations']
    assert cams.ids.tolist() == [a['id'] for a in annotations]
    header = cams.header
    assert header['classes'] == ['class_0', 'class_1', 'class_2'] and header['head'] == 'roi'
    assert header['annotation_file'] == 'train.json' and header['checkpoint'] == 'a.pth'
    shares = []
    chunks = extract.build_chunks(cfg, 1)
    model = extract.load_detector(cfg, checkpoint, cams.classes)
    for annotation in annotations:
        mask = cams.mask(annotation['id'])
        assert mask.shape == (annotation['bbox'][3], annotation['bbox'][2])
        shares.append(mask.mean())
    assert 0 < min(shares) and len(set(shares)) > 3 and min(shares) < 1
    # Image 3 once more by hand: image, box, label and id belong together.
    image = chunks[2][0]
    assert image['ids'].tolist() == [a['id'] for a in annotations if a['image_id'] == 3]
    box = annotations[5]['bbox']
    corners = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    assert image['boxes'][1].tolist() == corners
    pixels = model.data_preprocessor(
        dict(inputs=[image['data']['inputs']], data_samples=[image['data']['data_samples']]), False
    )['inputs']
    roi = torch.tensor([[0.0, *corners]])
    label = torch.tensor([annotations[5]['category_id'] - 1])
    cam = box_cams(model)[1](pixels, roi, label)[0].numpy()
    expected, _ = foreground(resample(cam, corners, corners))
    assert (cams.mask(6) != expected).mean() < 0.02  # batches of 1 and 2 may round differently


def test_boxes_follow_the_test_scale(data):
    """A test pipeline at twice the size: maps at the scaled boxes, masks in the file's pixels."""
    folder, _, checkpoint = data
    cfg = cam_config(folder)
    steps = cfg.test_dataloader.dataset.pipeline
    next(step for step in steps if step.type == 'Resize').scale = (128, 128)
    chunks = extract.build_chunks(cfg, 1)
    image = chunks[0][0]
    assert image['data']['inputs'].shape[1:] == (128, 128) and image['size'] == (64, 64)
    seen = []

    def spy(images, rois, labels):
        seen.append(rois.numpy())
        return torch.rand(len(rois), 5, 5)

    model = extract.load_detector(cfg, checkpoint, tuple(chunks.dataset.metainfo['classes']))
    entries, _ = extract.chunk_cams(model, spy, [image], 1.0)
    np.testing.assert_allclose(seen[0][:, 1:], image['boxes'] * 2)
    x1, y1, x2, y2 = image['boxes'][0]
    assert entries[0][1:3] == (y2 - y1, x2 - x1)


@pytest.mark.parametrize('stop', [1, 3])
def test_killed_and_continued(data, whole, tmp_path, monkeypatch, stop):
    """Stopped after some chunks, with half a line written: the same bytes in the end."""
    _, cfg, checkpoint = data
    out = tmp_path / 'one.cams'
    real, calls = extract.chunk_cams, []

    def stopping(*args):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(0)
        return real(*args)

    monkeypatch.setattr(extract, 'chunk_cams', stopping)
    with pytest.raises(KeyboardInterrupt):
        extract.extract_cams(cfg, checkpoint, out, batch_size=2)
    part = tmp_path / 'one.cams.parts' / 'rank-0000.jsonl'
    assert not out.exists() and part.read_text().count('\n') == stop
    with open(part, 'a') as file:
        file.write('{"chunk":6')
    done = []
    monkeypatch.setattr(extract, 'chunk_cams', lambda *a: done.append(0) or real(*a))
    extract.extract_cams(cfg, checkpoint, out, batch_size=2)
    assert len(done) == 4 - stop  # 7 images in chunks of 2
    assert out.read_bytes() == whole.read_bytes() and not part.parent.exists()
    done.clear()
    extract.extract_cams(cfg, checkpoint, out, batch_size=2)  # complete: nothing to do
    assert done == []


def test_two_ranks_in_turn(data, whole, tmp_path, monkeypatch):
    """Each rank does its chunks; the second one's arrival makes the file complete."""
    _, cfg, checkpoint = data
    out = tmp_path / 'one.cams'
    sizes = []

    def rank_is(rank, plan=None):
        monkeypatch.setattr(extract, 'get_dist_info', lambda: (rank, 2))
        monkeypatch.setattr(extract, 'barrier', lambda group: None)
        monkeypatch.setattr(
            extract,
            'broadcast_object_list',
            lambda box, **options: box.__setitem__(0, plan or box[0]),
        )

    rank_is(1, [0, 1, 2, 3])  # what rank 0 would have said
    (tmp_path / 'one.cams.parts').mkdir()
    extract.extract_cams(cfg, checkpoint, out, batch_size=2)
    sizes.append((tmp_path / 'one.cams.parts' / 'rank-0001.jsonl').read_text().count('\n'))
    rank_is(0, [0, 1, 2, 3])
    extract.extract_cams(cfg, checkpoint, out, batch_size=2)
    assert sizes == [2] and out.read_bytes() == whole.read_bytes()


def test_mmdet_data_sets_find_their_ids(data, whole, tmp_path):
    """CocoDataset drops annotation ids; they are found again by image, class and box."""
    folder, _, checkpoint = data
    cfg = cam_config(folder, dataset='CocoDataset')
    path = extract.extract_cams(cfg, checkpoint, tmp_path, batch_size=2)
    assert path.name == 'train.cams'
    one, other = CAMFile(path), CAMFile(whole)
    for annotation_id in other.ids:
        assert (one.mask(annotation_id) == other.mask(annotation_id)).all()


def test_one_stage(data, tmp_path):
    folder, _, _ = data
    cfg = cam_config(folder, 'retinanet')
    checkpoint = str(save_checkpoint(cfg, tmp_path / 'r.pth'))
    cams = CAMFile(extract.extract_cams(cfg, checkpoint, tmp_path / 'a.cams'))
    assert cams.header['head'] == 'dense' and len(cams) == 14
    assert len({cams.mask(i).mean() for i in cams.ids}) > 3


def edit(folder, tmp_path, change):
    """The toy data with a changed annotation file."""
    data = json.loads((folder / 'train.json').read_text())
    change(data)
    (tmp_path / 'train.json').write_text(json.dumps(data))
    (tmp_path / 'train').symlink_to(folder / 'train')
    return cam_config(tmp_path)


def test_odd_annotations(data, tmp_path):
    """Empty images, a crowd, a class of one image, a box over the border."""

    def change(d):
        d['annotations'] = [a for a in d['annotations'] if a['image_id'] not in (2, 5)]
        d['annotations'][0]['iscrowd'] = 1
        d['annotations'][1]['bbox'] = [50.5, -4.25, 30, 20]
        d['categories'].append(dict(id=9, name='class_3'))
        d['annotations'][2]['category_id'] = 9

    folder, _, _ = data
    cfg = edit(folder, tmp_path, change)
    cfg.model.roi_head.bbox_head.num_classes = 4
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.metainfo = dict()
    checkpoint = str(save_checkpoint(cfg, tmp_path / 'b.pth'))
    cams = CAMFile(extract.extract_cams(cfg, checkpoint, tmp_path / 'a.cams', batch_size=3))
    assert 1 not in cams.ids and len(cams) == 9 and cams.header['images'] == 5
    assert cams.mask(2).shape == (16, 14)  # rows 0 to 16, columns 50 to 64


def test_one_image(data, tmp_path):
    def change(d):
        d['images'] = d['images'][:1]
        d['annotations'] = d['annotations'][:1]

    folder, _, checkpoint = data
    cams = CAMFile(extract.extract_cams(edit(folder, tmp_path, change), checkpoint, tmp_path))
    assert cams.ids.tolist() == [1]


@pytest.mark.parametrize('kind', ['empty', 'crowd', 'no id', 'twice'])
def test_hopeless_annotations(data, tmp_path, kind):
    def change(d):
        if kind == 'empty':
            d['annotations'] = []
        for a in d['annotations']:
            if kind == 'crowd':
                a['iscrowd'] = 1
            elif kind == 'no id':
                del a['id']
            else:
                a['id'] = 1

    folder, _, checkpoint = data
    cfg = edit(folder, tmp_path, change)
    sentence = {'no id': 'has no annotation with an `id`', 'twice': 'id 1 occurs twice'}
    with pytest.raises(InputError, match=sentence.get(kind, 'no object to make a CAM of')):
        extract.extract_cams(cfg, checkpoint, tmp_path)


def test_wrong_input(data, whole, tmp_path):
    folder, cfg, checkpoint = data

    def refused(sentence, config=cfg, weights=checkpoint, out=tmp_path / 'x.cams', **options):
        with pytest.raises(InputError, match=sentence):
            extract.extract_cams(config, str(weights), out, **options)

    refused('batch size of at least 1.*found 0', batch_size=0)
    refused('positive threshold.*-1', threshold=-1)
    refused('threshold differs', out=whole, batch_size=2, threshold=0.5)
    other = save_checkpoint(cfg, tmp_path / 'a.pth', seed=5)
    refused('checkpoint_digest differs', weights=other, out=whole, batch_size=2)
    refused('expected weight bbox_head', cam_config(folder, 'retinanet'), checkpoint)
    wider = cam_config(folder)
    wider.model.roi_head.bbox_head.fc_out_channels = 40
    refused(r'weight roi_head.* of shape \(4, 40\)', wider)
    content = torch.load(checkpoint, weights_only=False)
    content['meta'] = dict(dataset_meta=dict(classes=('x', 'y', 'z')))
    torch.save(content, tmp_path / 'c.pth')
    refused("trained on 3 classes \\('x'", weights=tmp_path / 'c.pth')
    lacking = cam_config(folder)
    lacking.test_dataloader = None
    refused('needs key `test_dataloader`', lacking)
    joined = cam_config(folder)
    part = cfg.train_dataloader.dataset
    joined.train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[part, part]))
    refused('joins 2 data sets', joined)
