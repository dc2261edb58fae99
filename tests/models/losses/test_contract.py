"""Every registered loss keeps the contract with MMDetection's heads.

The checks are in ``contract_calls.py``, ``contract_state.py`` and ``contract_scores.py``. Losses
come from the registry, each with its default arguments and with each of ``tags.variants``:
``pytest tests/models/losses/test_contract.py -k YourLoss``.
"""

import copy
import os
import socket

import contract_calls  # noqa: F401
import contract_scores  # noqa: F401
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from contract_cases import (
    CHECKS,
    Result,
    assert_same,
    assert_same_state,
    cases_of,
    registered_losses,
    rows,
    run,
    set_seed,
)
from contract_state import batches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdet_lt.models.losses.running import flush

LOSSES = registered_losses()
RUNNING = [case for cls in LOSSES for case in cases_of(cls) if case.tags.running]
each_loss = pytest.mark.parametrize('cls', LOSSES, ids=lambda cls: cls.__name__)


@pytest.mark.parametrize('name', list(CHECKS))
@each_loss
def test_contract(cls, name):
    for case in cases_of(cls):
        CHECKS[name](case)


@each_loss
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine
)
@given(data=st.data())
def test_any_shape(cls, data):
    """Any mix of rows, classes, targets, weights and reductions gives finite numbers."""
    draw = data.draw
    case = draw(st.sampled_from(cases_of(cls)))
    num_classes, number = draw(st.integers(1, 8)), draw(st.integers(0, 7))
    loss = case.build(draw(st.sampled_from(case.contexts)), num_classes)
    seed, scale = draw(st.integers(0, 9)), draw(st.sampled_from([0.0, 1.0, 30.0]))
    z, label, weight = rows(loss, number, seed, scale)
    soft = torch.rand(number, num_classes) / num_classes
    target = draw(st.sampled_from(['label', 'soft', 'pair']))
    target = dict(label=label, soft=soft, pair=(label, weight.clamp(max=1)))[target]
    entries = weight[:, None].repeat(1, z.shape[1])
    weight = draw(st.sampled_from([None, weight, entries, weight * 0, (weight > 0.7).float()]))
    reduction = draw(st.sampled_from(['none', 'mean', 'sum']))
    result = run(loss, z, target, weight, reduction_override=reduction)
    assert result.value.isfinite().all() and result.grad.isfinite().all()
    shape = () if reduction != 'none' else z.shape if case.cls.sigmoid else (number,)
    assert result.value.shape == shape and result.grad.shape == z.shape


# ---- ranks ---------------------------------------------------------------------------------


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for case in RUNNING:
        alone, driven = case.build(), case.build()
        driven.step_driven = True
        values = []
        for step, (z, label, weight) in enumerate(batches(alone, 4)):
            mine, z = slice(0, 7) if rank == 0 else slice(7, 11), z.requires_grad_()
            set_seed(step)
            values.append(alone(z[mine], label[mine], weight[mine], avg_factor=1).item())
            if rank == 0 or step % 2:  # rank 1 has batches that never reach the loss
                for level in (slice(mine.start, mine.start + 2), slice(mine.start + 2, mine.stop)):
                    set_seed(step)
                    driven(z[level], label[level], weight[level], avg_factor=1)
            flush([driven])
        results[str(case)] = (alone.state_dict(), driven.state_dict(), values)
    torch.save(results, os.path.join(folder, f'{rank}.pth'))
    dist.barrier()
    os._exit(0)  # destroying a gloo group can abort the process while its threads finish


@pytest.fixture(scope='module')
def of_ranks(tmp_path_factory):
    """What two processes of one group got, for every loss with running statistics."""
    folder = tmp_path_factory.mktemp('ranks')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(folder)), nprocs=2)
    return [torch.load(folder / f'{rank}.pth') for rank in (0, 1)]


@pytest.mark.parametrize('case', RUNNING, ids=str)
def test_two_ranks_equal_one_process(case, of_ranks):
    first, second = (results[str(case)] for results in of_ranks)
    assert_same_state(first[0], second[0], rtol=0)
    assert_same_state(first[1], second[1], rtol=0)
    if case.tags.stochastic:
        return
    whole, partly, values = case.build(), case.build(), []
    partly.step_driven = True
    for step, (z, label, weight) in enumerate(batches(whole, 4)):
        z = z.requires_grad_()
        values.append(whole(z, label, weight, avg_factor=1).item())
        seen = slice(0, 11) if step % 2 else slice(0, 7)
        partly(z[seen], label[seen], weight[seen], avg_factor=1)
        flush([partly])
    assert_same_state(first[0], whole.state_dict())
    assert_same_state(first[1], partly.state_dict())
    if not case.tags.own_normalizer:
        assert [a + b for a, b in zip(first[2], second[2], strict=True)] == pytest.approx(values)


# ---- CUDA ----------------------------------------------------------------------------------


@pytest.mark.gpu
@each_loss
def test_cuda_equals_cpu_and_never_waits(cls):
    for case in cases_of(cls):
        for context in case.contexts:
            loss = case.build(context, num_classes=20)
            z, label, weight = rows(loss, 300)
            soft = torch.softmax(z[:, :20], 1)
            for target in (label, soft):
                inputs = [tensor.cuda() for tensor in (z, target, weight)]
                got = run(copy.deepcopy(loss).cuda(), *inputs, avg_factor=3)
                if not case.tags.stochastic:
                    kept = {name: value.cpu() for name, value in got.state.items()}
                    got = Result(got.value.cpu(), got.grad.cpu(), kept)
                    assert_same(got, run(loss, z, target, weight, avg_factor=3), rtol=1e-3)
                on_cuda, x = copy.deepcopy(loss).cuda(), inputs[0].requires_grad_()
                torch.cuda.set_sync_debug_mode('error')
                try:
                    on_cuda(x, *inputs[1:], avg_factor=3).backward()
                finally:
                    torch.cuda.set_sync_debug_mode('default')


def test_losses_are_found():
    assert {'EQLLoss', 'EQLv2Loss'} <= {cls.__name__ for cls in LOSSES}
    assert RUNNING and len(CHECKS) > 20
