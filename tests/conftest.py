"""Shared by all tests: helpers on the path and a cache of their own."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv('MMDET_LT_CACHE', str(tmp_path / '.cache'))


@pytest.fixture
def plain_config_dumps(monkeypatch):
    """No formatting of config dumps, which takes longer than a toy training."""
    for path in ('mmengine.config.config.FormatCode', 'yapf.yapflib.yapf_api.FormatCode'):
        # MMEngine imports it once, its onedl fork at every dump.
        monkeypatch.setattr(path, lambda text, **options: (text, False), raising=False)
