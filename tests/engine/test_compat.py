"""The safe loader reads mmengine's checkpoints, from any numpy, and still refuses the rest."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip('mmengine')

from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.optim.scheduler import OneCycleLR

from mmdet_lt.engine import compat

needs_safe_loader = pytest.mark.skipif(
    not compat._takes_named_globals(), reason='torch.load is not restricted below torch 2.6'
)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The state of a process that never called the function; the allow-list comes back after."""
    known = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(known)


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def load(data: bytes) -> object:
    return torch.load(io.BytesIO(data), weights_only=True)


def renamed(data: bytes, old: bytes, new: bytes) -> bytes:
    """The same checkpoint as the other major version of numpy would have written it."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, 'w') as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith('data.pkl'):
                assert old in content
                content = content.replace(old, new)
            target.writestr(name, content)
    return result.getvalue()


def checkpoint() -> dict:
    """What Runner.save_checkpoint stores besides weights, every kind of object once."""
    hub = MessageHub('compat')
    for value in (1.5, 2.5):
        hub.update_scalar('train/loss', value)
    hub.update_info('best_score', np.float64(0.25))
    hub.update_info('flags', np.array([True, False]))
    weight = torch.nn.Parameter(torch.zeros(2))
    schedule = OneCycleLR(torch.optim.SGD([weight], lr=0.1), eta_max=1.0, total_steps=4)
    metainfo = dict(classes=('a', 'b'), palette=np.arange(6, dtype=np.uint8).reshape(2, 3))
    return dict(
        meta=dict(epoch=1, seed=np.int64(7), dataset_meta=ConfigDict(nested=metainfo)),
        message_hub=hub.state_dict(),
        param_schedulers=[schedule.state_dict()],
        state_dict=dict(weight=weight.detach()),
    )


@needs_safe_loader
def test_training_checkpoint_loads_only_after_the_call(forgotten):
    data = saved(checkpoint())
    with pytest.raises(pickle.UnpicklingError):
        load(data)
    assert compat.allow_mmengine_checkpoints()
    content = load(data)
    buffer = content['message_hub']['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer)
    assert buffer.mean() == 2.0 and buffer.statistics('max') == 2.5
    assert content['message_hub']['runtime_info']['best_score'] == 0.25
    assert content['meta']['seed'] == 7
    nested = content['meta']['dataset_meta']['nested']
    assert nested['classes'] == ('a', 'b')
    np.testing.assert_array_equal(nested['palette'], [[0, 1, 2], [3, 4, 5]])
    anneal = content['param_schedulers'][0]['anneal_func']
    assert anneal(0.0, 1.0, 1.0) == pytest.approx(1.0)


@needs_safe_loader
@pytest.mark.parametrize('module', [b'numpy.core.multiarray', b'numpy._core.multiarray'])
@pytest.mark.parametrize('kind', ['?', 'i1', 'i8', 'u8', 'f2', 'f4', 'f8', 'c8', 'S3', 'U3'])
def test_numpy_objects_of_both_major_versions(module, kind):
    compat.allow_mmengine_checkpoints()
    array = np.array([1, 0]).astype(kind)
    data = saved([array, array[0]])
    here = b'numpy._core.multiarray' if b'numpy._core' in data else b'numpy.core.multiarray'
    loaded, scalar = load(renamed(data, here, module))
    assert loaded.dtype == array.dtype and scalar.dtype == array[0].dtype
    np.testing.assert_array_equal(loaded, array)


class Attack:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@needs_safe_loader
@pytest.mark.parametrize(
    'attack',
    [
        Attack(os.system, 'true'),
        Attack(eval, '1'),
        Attack(getattr, HistoryBuffer, '__init__'),
        Attack(getattr, HistoryBuffer, '__subclasses__'),
        Attack(getattr, np.ndarray, 'tofile'),
        Attack(np.load, 'x'),
    ],
    ids=['system', 'eval', 'init', 'subclasses', 'tofile', 'np.load'],
)
def test_loader_stays_safe(attack):
    compat.allow_mmengine_checkpoints()
    with pytest.raises(pickle.UnpicklingError):
        load(saved([HistoryBuffer(), attack]))


@needs_safe_loader
def test_second_call_adds_nothing(forgotten):
    assert compat.allow_mmengine_checkpoints()
    known = set(torch.serialization.get_safe_globals())
    assert known
    assert compat.allow_mmengine_checkpoints()
    assert set(torch.serialization.get_safe_globals()) == known


@needs_safe_loader
def test_entries_taken_off_by_others_come_back(forgotten):
    """The onedl fork's loader removes what it had added, ours included."""
    assert compat.allow_mmengine_checkpoints()
    known = set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([HistoryBuffer, np.ndarray]):
        pass
    assert set(torch.serialization.get_safe_globals()) < known
    assert compat.allow_mmengine_checkpoints()
    assert set(torch.serialization.get_safe_globals()) == known


def test_old_torch_is_left_alone(monkeypatch):
    """torch 2.1 has no add_safe_globals; 2.4 has one that takes no names."""
    monkeypatch.setattr(torch.serialization, 'add_safe_globals', None, raising=False)
    for version in ('2.1.2+cu118', '2.4.0', '2.5.1'):
        monkeypatch.setattr(torch, '__version__', version)
        assert compat.allow_mmengine_checkpoints() is False
    monkeypatch.delattr(torch.serialization, 'add_safe_globals')
    monkeypatch.setattr(torch, '__version__', '2.6.0')
    assert compat.allow_mmengine_checkpoints() is False
