"""The worked example of CONTRIBUTING.md is a loss that keeps the whole contract."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest

from mmdet_lt.registration import register_all
from mmdet_lt.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
NAME = 'inverse_frequency_loss'
MODULE = f'mmdet_lt.models.losses.{NAME}'


def code_blocks():
    section = (ROOT / 'CONTRIBUTING.md').read_text().split('## Adding a loss')[1].split('\n## ')[0]
    return re.findall(r'```python\n(.*?)```', section, re.DOTALL)


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def example(tmp_path_factory):
    """The two blocks as modules; nothing of them is left behind."""
    register_all()
    folder = tmp_path_factory.mktemp('example')
    modules = []
    try:
        for block, name in zip(code_blocks(), (MODULE, f'test_{NAME}'), strict=True):
            path = folder / f'{name.rpartition(".")[2]}.py'
            path.write_text(block)
            modules.append(load(path, name))
        yield modules
    finally:
        MODELS.module_dict.pop('InverseFrequencyLoss', None)
        for name in (MODULE, f'test_{NAME}'):
            sys.modules.pop(name, None)


def test_the_example_keeps_the_contract(example, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tests' / 'models' / 'losses'))
    for name in ('contract_calls', 'contract_scores', 'contract_state'):
        importlib.import_module(name)
    from contract_cases import CHECKS, cases_of

    cases = cases_of(example[0].InverseFrequencyLoss)
    assert len(cases) == 3 and len(CHECKS) > 20
    for case in cases:
        for check in CHECKS.values():
            check(case)


def test_the_test_of_the_example_passes(example):
    tests = [f for name, f in inspect.getmembers(example[1]) if name.startswith('test_')]
    assert len(tests) == 3
    for test in tests:
        test()


def test_the_example_is_short():
    loss = code_blocks()[0].splitlines()
    code = loss[next(i for i, line in enumerate(loss) if line.startswith('@MODELS')) :]
    assert len(loss) < 70 and len(code) <= 45 and max(map(len, loss)) <= 100
