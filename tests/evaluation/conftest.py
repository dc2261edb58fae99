import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers, in every import mode of pytest

import lvis_oracle as oracle  # noqa: E402
from evaluation_tools import write  # noqa: E402


@pytest.fixture
def set_up(tmp_path):
    data = oracle.make_data(0)
    return write(tmp_path / 'gt.json', data), data, oracle.make_samples(data, 1)


@pytest.fixture
def warnings(monkeypatch):
    """Messages logged at warning level by the metric."""
    seen = []

    def log(message, logger=None, level=logging.INFO):
        if level >= logging.WARNING:
            seen.append(message)

    monkeypatch.setattr('mmdet_lt.evaluation.classes.print_log', log)
    monkeypatch.setattr('mmdet_lt.evaluation.metrics.lvis_metric.print_log', log)
    return seen
