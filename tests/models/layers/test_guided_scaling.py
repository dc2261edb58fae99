"""Guided loss scaling on dictionaries of losses: ratios, averages, edge cases, ranks."""

import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmdet_lt import InputError
from mmdet_lt.models.layers.guided_scaling import GuidedLossScaling, loss_role, loss_value

EVERY = dict(momentum=0.0, clamp=None)


def losses(cls, box, **others):
    values = dict(loss_cls=cls, loss_bbox=box, **others)
    return {k: v if isinstance(v, list) else torch.tensor(float(v)) for k, v in values.items()}


@pytest.mark.parametrize(
    ('key', 'role'),
    [
        ('loss_cls', 'cls'),
        ('loss_rpn_cls', 'cls'),
        ('rpn_loss_cls', 'cls'),
        ('s1.loss_cls', 'cls'),
        ('loss_cls_objectness', 'cls'),
        ('loss_bbox', 'box'),
        ('loss_rpn_bbox', 'box'),
        ('loss_bbox_cls', 'box'),
        ('loss_bbox_rf', 'box'),
        ('loss_dfl', 'box'),
        ('loss_centerness', 'quality'),
        ('loss_iou', 'quality'),
        ('loss_mask', 'other'),
        ('loss_mask_iou', 'other'),
        ('loss_semantic_seg', 'other'),
        ('acc', 'other'),
        ('s0.acc', 'other'),
    ],
)
def test_roles(key, role):
    assert loss_role(key) == role


def test_2020_makes_the_losses_equal_in_every_iteration():
    """A logit with an absurd scale, trained for 100 iterations: the ratio stays exactly 1."""
    torch.manual_seed(0)
    guide = GuidedLossScaling(['dense'], **EVERY)
    logit = torch.nn.Parameter(torch.zeros(50))
    box = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([logit, box], lr=0.1)
    for step in range(100):
        cls = 1e4 * torch.nn.functional.softplus(logit).sum()
        levels = [cls * 0.3, cls * 0.7]
        out = guide(dict(loss_cls=levels, loss_bbox=[(box - 3).abs().mean()]))
        assert loss_value(out['loss_cls']).item() == pytest.approx(
            loss_value(out['loss_bbox']).item(), rel=1e-5
        )
        optimizer.zero_grad()
        (sum(out['loss_cls']) + out['loss_bbox'][0]).backward()
        expected = out['guide_dense'] * 1e4 * torch.sigmoid(logit)
        torch.testing.assert_close(logit.grad, expected, rtol=1e-4, atol=1e-9)
        optimizer.step()
        assert guide.steps == step + 1


def test_roi_heads_count_double_and_masks_are_left():
    guide = GuidedLossScaling(['rpn', 'roi'], **EVERY)
    given = losses(8, 2, loss_mask=5, loss_rpn_cls=3, loss_rpn_bbox=6)
    out = guide(given)
    assert out['loss_cls'] == 4 and out['loss_rpn_cls'] == 6
    assert out['loss_bbox'] == 2 and out['loss_mask'] == 5
    assert 'loss' not in ''.join(k for k in out if k.startswith('guide'))


def test_cascade_stages_have_ratios_of_their_own():
    guide = GuidedLossScaling(['rpn', 's0', 's1'], **EVERY)
    given = losses(1, 1)
    given = {f's{s}.{k}': v * (s + 1) * (2 if 'cls' in k else 1) for s in (0, 1) for k, v in
             given.items()}  # fmt: skip
    given.update({'loss_rpn_cls': torch.tensor(1.0), 'loss_rpn_bbox': torch.tensor(4.0)})
    out = guide(given)
    assert [out[f's{s}.loss_cls'].item() for s in (0, 1)] == [2, 4]
    assert out['loss_rpn_cls'] == 4


def test_mean_of_all_others_guides_2021():
    guide = GuidedLossScaling(['dense'], ['dense'], guide_by='mean', **EVERY)
    assert guide(losses(10, 1, loss_centerness=3))['loss_cls'] == 2
    guide = GuidedLossScaling(['dense'], ['dense'], **EVERY)
    assert guide(losses(10, 1, loss_centerness=3))['loss_cls'] == 1


def test_running_ratio_is_that_of_averaged_sums():
    guide = GuidedLossScaling(['dense'], momentum=0.9)
    for cls, box in ((10, 1), (20, 4)):
        out = guide(losses(cls, box))
    expected = (0.9 * 1 + 0.1 * 4) / (0.9 * 10 + 0.1 * 20)
    assert out['guide_dense'].item() == pytest.approx(expected)
    assert out['loss_cls'].item() == pytest.approx(20 * expected)


def test_a_batch_without_objects_keeps_the_ratio():
    guide = GuidedLossScaling(['dense'], **EVERY)
    assert guide(losses(7, 0))['loss_cls'] == 7  # nothing known yet: 1
    guide(losses(10, 5))
    out = guide(losses(3, 0))
    assert out['guide_dense'] == 0.5 and out['loss_cls'] == 1.5
    assert guide(losses(4, 1))['guide_dense'] == 0.25


def test_bounds_and_freeze():
    guide = GuidedLossScaling(['dense'], momentum=0.0, clamp=(0.1, 10), freeze_after=2)
    ratios = [guide(losses(*v))['guide_dense'].item() for v in ((1e6, 1), (1, 1e6), (1, 3))]
    assert ratios == pytest.approx([0.1, 10, 10])
    assert guide.steps == 3


def test_freezing_waits_for_a_first_ratio():
    guide = GuidedLossScaling(['rpn', 'roi'], momentum=0.0, clamp=None, freeze_after=1)

    def step(rpn, roi):
        given = dict(loss_rpn_cls=rpn[0], loss_rpn_bbox=rpn[1], loss_cls=roi[0], loss_bbox=roi[1])
        out = guide({k: torch.tensor(float(v)) for k, v in given.items()})
        return out['guide_rpn'].item(), out['guide_roi'].item()

    assert step((4, 2), (8, 0)) == (0.5, 1)  # no object for the RoI head
    assert step((4, 4), (8, 0)) == (0.5, 1)
    assert step((4, 4), (8, 2)) == (0.5, 0.25)  # the first such batch is its warm-up
    assert step((4, 4), (8, 8)) == (0.5, 0.25)


def test_evaluation_learns_nothing():
    guide = GuidedLossScaling(['dense'], **EVERY)
    guide(losses(10, 5))
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    with torch.no_grad():
        guide(losses(1, 50))
    guide.eval()
    assert guide(losses(1, 50))['loss_cls'] == 0.5
    assert all(torch.equal(before[k], v) for k, v in guide.state_dict().items())


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('key', ['loss_cls', 'loss_bbox', 'loss_mask'])
def test_a_loss_that_is_not_finite_stops_before_anything_learns(key, bad):
    guide = GuidedLossScaling(['dense'])
    guide(losses(10, 5, loss_mask=1))
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    with pytest.raises(InputError, match=rf'`{key}` is {bad:g} in iteration 2'):
        guide({**losses(10, 5, loss_mask=1), key: torch.tensor(bad)})
    assert all(torch.equal(before[k], v) for k, v in guide.state_dict().items())
    assert math.isfinite(guide(losses(8, 4, loss_mask=1))['loss_cls'])


def test_unchecked_nan_never_enters_the_ratio():
    guide = GuidedLossScaling(['dense'], check_finite=False)
    guide(losses(10, 5))
    out = guide(losses(float('nan'), 5))
    assert out['guide_dense'] == 0.5 and torch.isnan(out['loss_cls'])
    assert guide(losses(10, 5))['guide_dense'] == 0.5


def test_a_detector_without_localisation_loss_is_refused():
    guide = GuidedLossScaling(['dense'])
    with pytest.raises(InputError, match=r"'dense', found the losses \['loss_cls', 'loss_mask'\]"):
        guide(dict(loss_cls=torch.ones(()), loss_mask=torch.ones(())))
    with pytest.raises(InputError, match=r"found the losses \['loss_bbox'\]"):
        guide(dict(loss_bbox=torch.ones(())))


def test_an_roi_head_without_rows_takes_part():
    guide = GuidedLossScaling(['rpn', 'roi'], **EVERY)
    out = guide(dict(loss_rpn_cls=torch.ones(()), loss_rpn_bbox=torch.ones(())))
    assert out['guide_roi'] == 1 and guide.steps == 1


def test_uncertainty_is_the_published_form():
    guide = GuidedLossScaling(['dense'], ['dense'], uncertainty=True, guide_by='mean', **EVERY)
    out = guide(losses(10, 1, loss_centerness=3, loss_other=7))
    values = {k: out[k].item() for k in ('loss_cls', 'loss_bbox', 'loss_centerness', 'loss_other')}
    # σ = 1: every loss of the group is halved.
    assert values == dict(loss_cls=1, loss_bbox=0.5, loss_centerness=1.5, loss_other=7)
    assert out['loss_uncertainty'] == 0
    sigma = torch.tensor([0.5, 2.0, 3.0])
    with torch.no_grad():
        guide.log_sigma.copy_(sigma.log())
    out = guide(losses(10, 1, loss_centerness=3))
    total = sum(v for k, v in out.items() if 'loss' in k)
    expected = (torch.tensor([2.0, 1.0, 3.0]) / (2 * sigma**2)).sum() + sigma.prod().log()
    torch.testing.assert_close(total, expected)


def test_half_precision_losses_are_reduced_in_float32():
    guide = GuidedLossScaling(['dense'], **EVERY)
    levels = [torch.tensor(40000.0, dtype=torch.float16)] * 4  # their sum overflows in float16
    out = guide(dict(loss_cls=levels, loss_bbox=torch.tensor(1.0, dtype=torch.float16)))
    assert out['guide_dense'].item() == pytest.approx(1 / 160000)


def test_state_is_resumed():
    first = GuidedLossScaling(['dense'])
    for step in range(5):
        first(losses(10 + step, 5))
    second = GuidedLossScaling(['dense'])
    second.load_state_dict(first.state_dict())
    assert first(losses(3, 4))['loss_cls'] == second(losses(3, 4))['loss_cls']
    assert second.steps == 6


def _values(step):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(2, 2, generator=generator) + 0.1  # rank, (cls, box)


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    torch.set_num_threads(1)
    guide = GuidedLossScaling(['dense'])
    for step in range(6):
        cls, box = _values(step)[rank].tolist()
        guide(losses(cls, 0 if rank == 1 and step == 3 else box))  # one rank without objects
    message = ''
    try:
        guide(losses(float('nan') if rank == 0 else 1, 1))
    except InputError as error:
        message = str(error)
    torch.save((guide.state_dict(), message), os.path.join(folder, f'{rank}.pth'))
    dist.barrier()
    os._exit(0)  # destroying a gloo group can abort the process while its threads finish


def test_two_ranks_equal_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    (first, told), (second, also_told) = (torch.load(tmp_path / f'{r}.pth') for r in (0, 1))
    one = GuidedLossScaling(['dense'])
    for step in range(6):
        values = _values(step)
        if step == 3:
            values[1, 1] = 0
        one(losses(*values.mean(0).tolist()))
    for key, value in one.state_dict().items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value)
    # Both stop, and the one that holds the loss names it.
    assert '`loss_cls` is nan' in told and 'another rank' in also_told
