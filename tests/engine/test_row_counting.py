"""Counting the rows that reach a classifier: every assigner, target shape, rank and seed."""

import os
import random
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.structures import InstanceData
from row_oracle import add_assigned, by_assigner, by_points, loader_of, model_of, truths
from torch import nn
from torch.utils.data import DataLoader
from toy import make_toy_coco

from mmdet_lt.engine.hooks._row_counting import RowCounter, count_rows


@pytest.fixture
def data(tmp_path):
    make_toy_coco(tmp_path / 'data', num_images=5)
    return tmp_path / 'data'


@pytest.mark.parametrize('kind', ['RetinaNet', 'ATSS', 'GFL', 'FCOS', 'FasterRCNN'])
def test_counts_equal_the_assigner_called_by_hand(data, kind):
    loader = loader_of(data)
    model = model_of(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    expected_draw = torch.rand(1)
    torch.manual_seed(7)
    rows = count_rows(model, loader)
    assert torch.equal(torch.rand(1), expected_draw)
    for key, value in model.state_dict().items():  # counts are NaN until they are stored
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)
    expected = by_points(model, loader) if kind == 'FCOS' else by_assigner(kind, model, loader)
    assert rows['rpn_head' if kind == 'FasterRCNN' else 'bbox_head'] == expected
    assert sum(expected[:-1]) > 0 and expected[-1] > sum(expected[:-1])


def test_rows_of_a_roi_head_are_its_proposals_and_the_truth(data):
    loader = loader_of(data, batch_size=1)
    model = model_of('FasterRCNN').eval()
    model.backbone.norm_eval = True  # the same proposals in both modes
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    counts = [0] * 4
    head = model.roi_head
    model.train()
    for sample in truths(model, loader):
        truth = sample['data_samples'][0].gt_instances
        with torch.no_grad():
            features = model.extract_feat(sample['inputs'])
            found = model.rpn_head.predict(features, sample['data_samples'], rescale=False)
        # `predict` uses the settings of testing, which are those of training here.
        boxes = torch.cat([truth.bboxes, found[0].bboxes])
        result = head.bbox_assigner.assign(InstanceData(priors=boxes), truth)
        add_assigned(counts, result.gt_inds, truth.labels)
    rows = count_rows(model, loader)['roi_head.bbox_head']
    assert rows == counts and sum(rows[:-1]) >= 10


def test_fewer_images_are_spaced_evenly(data):
    loader, model = loader_of(data), model_of('RetinaNet')
    seen = []
    original = loader.dataset.__class__.__getitem__

    class Recording(loader.dataset.__class__):
        def __getitem__(self, index):
            seen.append(int(index))
            return original(self, index)

    loader.dataset.__class__ = Recording
    count_rows(model, loader, 3)
    assert seen == [0, 2, 4]


def counted(loss_call):
    counter = RowCounter(3, torch.device('cpu'))
    loss = nn.Identity()
    loss.forward = lambda *args, **kwargs: None
    loss.register_forward_pre_hook(counter, with_kwargs=True)
    loss_call(loss)
    return counter.rows.tolist()


def test_every_shape_of_target_is_understood():
    z, label = torch.zeros(4, 3), torch.tensor([0, 2, 3, 3])
    weight = torch.tensor([1.0, 1, 0, 0.5])
    assert counted(lambda loss: loss(z, label)) == [1, 0, 1, 2]
    assert counted(lambda loss: loss(z, label, weight, avg_factor=1)) == [1, 0, 1, 1]
    assert counted(lambda loss: loss(z, (label, weight), weight=weight)) == [1, 0, 1, 1]
    wide = weight[:, None].expand(4, 3)
    assert counted(lambda loss: loss(z, label, wide)) == [1, 0, 1, 1]
    outside = torch.tensor([0, -1, 9, 3])
    assert counted(lambda loss: loss(z, outside)) == [1, 0, 0, 3]
    soft = torch.tensor([[0, 0.3, 0], [0, 0, 0], [0, 0, 0.9], [0, 0, 0]])
    assert counted(lambda loss: loss(z, soft)) == [0, 1, 1, 2]
    # PAA and OHEM look for hard rows first: not counted.
    assert counted(lambda loss: loss(z, label, weight, 1.0, 'none')) == [0, 0, 0, 0]
    assert counted(lambda loss: loss(z, label, reduction_override='none')) == [0, 0, 0, 0]


#: Images of many sizes, padded to the largest of their batch.
RANDOM = [dict(type='RandomResize', scale=(64, 64), ratio_range=(0.5, 2.0), keep_ratio=True)]


def _counts(data):
    plain, varied = loader_of(data), loader_of(data, steps=RANDOM)
    return [
        count_rows(model_of(kind), loader, images)
        for kind, loader, images in (
            ('RetinaNet', plain, None),
            ('FCOS', plain, None),
            ('FCOS', plain, 1),
            ('FCOS', varied, None),
            ('FasterRCNN', varied, None),
        )
    ]


def _rank(rank, port, folder, data):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(_counts(data), os.path.join(folder, f'{rank}.pth'))
    dist.barrier()
    os._exit(0)  # destroying a gloo group can abort the process while its threads finish


def test_two_ranks_equal_one(data, tmp_path):
    """Five images over two ranks, of equal and of random sizes; one leaves a rank without any."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path), str(data)), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    assert first == second == _counts(data)


def test_counts_depend_on_neither_seed_nor_workers(data):
    loader = loader_of(data, steps=RANDOM)
    first = count_rows(model_of('FCOS'), loader)
    model = model_of('FCOS')
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    other = DataLoader(loader.dataset, 2, num_workers=1, collate_fn=loader.collate_fn)
    assert count_rows(model, other) == first
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
