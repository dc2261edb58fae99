"""Toy data, configs and a trained run shared by the tests of the command-line tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tool_helpers import RANK_RECORD, load_tool, run_tool
from toy import make_toy_coco, write_toy_config


@pytest.fixture(scope='session')
def toy(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Toy data and two configs in one folder: ``config`` (2 epochs) and ``recorded``."""
    root = tmp_path_factory.mktemp('toy')
    make_toy_coco(root / 'data')
    (root / 'rank_record.py').write_text(RANK_RECORD)
    extra = "custom_imports = dict(imports=['rank_record'], allow_failed_imports=False)\n"
    extra += "custom_hooks = [dict(type='mmengine.RankRecord', folder='.')]\n"
    return SimpleNamespace(
        root=root,
        config=write_toy_config(root / 'retinanet.py', root / 'data', epochs=2),
        other=write_toy_config(root / 'faster_rcnn.py', root / 'data', 'faster_rcnn'),
        recorded=write_toy_config(root / 'recorded.py', root / 'data', extra=extra, epochs=2),
    )


@pytest.fixture(scope='session')
def trained(toy: SimpleNamespace) -> Path:
    """Work directory of an uninterrupted run of ``toy.config``; tests only read it."""
    done = run_tool('tools/train.py', toy.config, '--work-dir', 'trained', cwd=toy.root)
    assert done.returncode == 0, done.stderr
    return toy.root / 'trained'


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Call a tool in this process: status and lines of standard error."""
    monkeypatch.setenv('LOCAL_RANK', '0')  # the tools set it; monkeypatch puts it back
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')

    def run(name: str, *argv: str | Path) -> tuple[int, list[str]]:
        from mmdet_lt.engine.launch import run_cli

        capsys.readouterr()
        status = run_cli(load_tool(name).main, [str(word) for word in argv])
        return status, capsys.readouterr().err.splitlines()

    return run
