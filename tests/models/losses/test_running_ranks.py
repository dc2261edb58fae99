"""Running statistics: two ranks equal one process on the concatenated batch."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmdet_lt.models.losses.eqlv2_loss import EQLv2Loss
from mmdet_lt.models.losses.running import flush


def _batches(steps=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        z = torch.randn(12, 6, generator=generator)
        yield z, torch.randint(0, 6, (12,), generator=generator)


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    dist.init_process_group('gloo', rank=rank, world_size=2)
    torch.set_num_threads(1)
    alone, first, second = (EQLv2Loss(num_classes=5) for _ in range(3))
    first.step_driven = second.step_driven = True
    for step, (z, label) in enumerate(_batches()):
        mine = slice(0, 7) if rank == 0 else slice(7, 12)
        alone(z[mine], label[mine], avg_factor=1)
        first(z[mine], label[mine], avg_factor=1)
        if rank == 0 or step % 2:  # rank 1 has batches that never reach the second loss
            second(z[mine], label[mine], avg_factor=1)
        flush([first, second])
    states = [loss.state_dict() for loss in (alone, first, second)]
    torch.save(states, os.path.join(folder, f'{rank}.pth'))
    dist.barrier()
    os._exit(0)  # destroying a gloo group can abort the process while its threads finish


def test_two_ranks_equal_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    states = [torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1)]
    whole, partly = EQLv2Loss(num_classes=5), EQLv2Loss(num_classes=5)
    for step, (z, label) in enumerate(_batches()):
        whole(z, label, avg_factor=1)
        seen = slice(0, 12) if step % 2 else slice(0, 7)
        partly(z[seen], label[seen], avg_factor=1)
    for index, expected in enumerate((whole, whole, partly)):
        for key, value in expected.state_dict().items():
            assert torch.equal(states[0][index][key], states[1][index][key]), key
            torch.testing.assert_close(states[0][index][key], value, rtol=1e-5, atol=1e-6)
