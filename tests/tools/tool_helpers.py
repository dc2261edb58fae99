"""Run the command-line tools from tests, as processes or in this one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

REPO = Path(__file__).resolve().parents[2]

RANK_RECORD = """
import hashlib, os
import torch
from mmengine.dist import get_backend, get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class RankRecord(Hook):
    # Writes what each rank trained on and ended with, to compare the ranks.
    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen += [sample.img_id for sample in data_batch['data_samples']]

    def after_run(self, runner):
        model = getattr(runner.model, 'module', runner.model)
        lines = [get_backend() or 'none', str(torch.get_num_threads()), str(sorted(self.seen))]
        for tensors in (model.parameters(), model.buffers()):
            digest = hashlib.sha256()
            for tensor in tensors:
                digest.update(tensor.detach().numpy().tobytes())
            lines.append(digest.hexdigest())
        with open(os.path.join(self.folder, f'rank{get_rank()}.txt'), 'w') as file:
            file.write('\\n'.join(lines))
"""


def clean_environment(**extra: str) -> dict[str, str]:
    """Environment for a tool: nothing of an outer launcher, the python of this test run."""
    drop = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'PORT', 'GPUS')
    env = {name: value for name, value in os.environ.items() if name not in drop}
    return {**env, 'PYTHON': sys.executable, 'CUDA_VISIBLE_DEVICES': '', **extra}


def run_tool(
    *command: str | Path, cwd: Path, timeout: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a tool of the repository, named relative to it; python files with this python."""
    words = [str(word) for word in command]
    tool = str(REPO / words[0])
    prefix = [sys.executable] if tool.endswith('.py') else []
    return subprocess.run(
        [*prefix, tool, *words[1:]],
        cwd=cwd,
        env=clean_environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def load_tool(name: str) -> ModuleType:
    """Import ``tools/<name>.py`` to call it in this process."""
    spec = importlib.util.spec_from_file_location(f'tool_{name}', REPO / 'tools' / f'{name}.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
