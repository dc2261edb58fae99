"""The rules of the set-up: what fits, what is missing, what is keyed by what.

Imported by ``tools/setup_env.py``; uses the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
ONEDL_VENV = ROOT / '.venv-onedl'
TORCH = '2.13.0'  # installed where there is no torch
TORCH_RANGE = ((2, 1), (2, 13))
PYTHON_RANGE = ((3, 10), (3, 12))
# Distribution -> (first version that works, first that does not); mmdet asserts it at import.
STOCK = {
    'mmcv': ('2.0.0', '2.2.0'),
    'mmengine': ('0.10.0', '1.0.0'),
    'mmdet': ('3.3.0', '3.4.0'),
}
ONEDL = {
    'onedl-mmcv': ('2.3.0', '3.0.0'),
    'onedl-mmengine': ('0.10.8', '1.0.0'),
    'onedl-mmdetection': ('3.5.0', '4.0.0'),
}
UNUSABLE = {'mmcv-lite': 'it has no compiled operators', 'mmcv-full': 'it is mmcv 1.x'}
OPENCV = [f'opencv-{kind}' for kind in ('python', 'contrib-python')]
OPENCV += [f'{name}-headless' for name in OPENCV]
DISTS = ['torch', 'numpy', *STOCK, *ONEDL, 'imaug', *UNUSABLE, *OPENCV]
IMPORTS = 'cv2 mmcv mmengine mmdet pycocotools matplotlib tqdm'.split()

PROBE = """
import importlib.metadata as metadata, importlib.util as util, json, sys, sysconfig
dists = {}
for name in sys.argv[1:]:
    try:
        dists[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(dict(python=sys.version_info[:3], prefix=sys.prefix, dists=dists,
                      include=sysconfig.get_paths()['include'],
                      pip=bool(util.find_spec('pip')), cv2=bool(util.find_spec('cv2')))))
"""
TORCH_PROBE = """
import json, os, platform, sys, sysconfig, torch
from torch.utils.cpp_extension import CUDA_HOME
gpu = torch.cuda.is_available()
arch = 'sm%d%d' % torch.cuda.get_device_capability() if gpu else ''
print(json.dumps(dict(
    python=sys.implementation.cache_tag, torch=torch.__version__, cuda=torch.version.cuda,
    hip=torch.version.hip, gpu=gpu, arch=os.environ.get('TORCH_CUDA_ARCH_LIST', arch),
    abi=int(torch.compiled_with_cxx11_abi()), cuda_home=CUDA_HOME,
    platform=sysconfig.get_platform(), libc='-'.join(platform.libc_ver()))))
"""
OPS_PROBE = """
import torch
from mmcv.ops import nms
for device in {devices!r}:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9], [20, 20, 29, 29]], device=device)
    assert len(nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)[1]) == 2
"""


class Stop(Exception):
    """Set-up cannot go on; the message is one sentence for the user."""


def version_tuple(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``2.13.0+cpu`` gives (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r'\d+', text.split('+')[0])[:3])


def check_python(version: tuple[int, ...], what: str = 'This') -> None:
    if not PYTHON_RANGE[0] <= tuple(version[:2]) <= PYTHON_RANGE[1]:
        raise Stop(
            f'{what} is Python {version[0]}.{version[1]}, but 3.10 to 3.12 is needed: install one '
            'and run `make setup PYTHON=/path/to/python3.11` (leave an active environment first).'
        )


def check_torch(version: str) -> None:
    if not TORCH_RANGE[0] <= version_tuple(version)[:2] <= TORCH_RANGE[1]:
        raise Stop(
            f'The active environment has torch {version}, but 2.1 to 2.13 is supported: activate '
            'another environment, or leave this one to have .venv created.'
        )


def check_stack(dists: Mapping[str, str]) -> str:
    """Return the family to use, ``stock`` or ``onedl``, or stop at packages that do not fit."""
    advice = 'uninstall the wrong one and run `make setup` again.'
    for name in UNUSABLE:
        if name in dists:
            raise Stop(f'{name} {dists[name]} cannot be used since {UNUSABLE[name]}: {advice}')
    stock, onedl = [[n for n in family if n in dists] for family in (STOCK, ONEDL)]
    if stock and onedl:
        found = ', '.join(f'{name} {dists[name]}' for name in (*stock, *onedl))
        raise Stop(f'The environment mixes OpenMMLab packages and their forks ({found}): {advice}')
    if onedl and len(onedl) < len(ONEDL):
        missing = ', '.join(name for name in ONEDL if name not in dists)
        raise Stop(f'{onedl[0]} {dists[onedl[0]]} needs its siblings: install {missing} as well.')
    family = ONEDL if onedl else STOCK
    for name in onedl or stock:
        low, high = family[name]
        if not version_tuple(low) <= version_tuple(dists[name]) < version_tuple(high):
            found = ', '.join(f'{n} {dists[n]}' for n in onedl or stock)
            expected = ', '.join(f'{n} >={r[0]},<{r[1]}' for n, r in family.items())
            raise Stop(f'Incompatible packages: found {found}; expected {expected}: {advice}')
    return 'onedl' if onedl else 'stock'


def check_compiler(include: str) -> None:
    """Stop unless C++ with Python's headers compiles; mmcv has no wheels for current torch."""
    compiler = os.environ.get('CXX', 'c++').split()
    missing = [name for name in (compiler[0], 'gcc') if not shutil.which(name)]
    if missing and not (sys.platform == 'darwin' and missing == ['gcc']):
        raise Stop(
            f'No C++ compiler ({missing[0]} is not on PATH), which building mmcv needs: install '
            'gcc and g++ (Debian, Ubuntu: apt-get install build-essential).'
        )
    command = [*compiler, '-std=c++17', '-fsyntax-only', '-I', include, '-x', 'c++', '-']
    code = '#include <Python.h>\n#include <optional>\nint main() { return 0; }\n'
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    if done.returncode and 'Python.h' in done.stderr:
        raise Stop(
            'Python.h is missing, which building mmcv needs: install the headers of this Python '
            f'(Debian, Ubuntu: apt-get install python3-dev; looked in {include}).'
        )
    if done.returncode:
        raise Stop(f'{compiler[0]} cannot compile C++17, which mmcv needs: install gcc 9 or newer.')


def choose_ops(info: Mapping) -> tuple[str, str]:
    """Return which operators of mmcv to build, ``cpu``, ``cuda`` or ``rocm``, and a remark."""
    forced = os.environ.get('MMDET_LT_MMCV_OPS')
    if forced:
        return forced, ''
    if info.get('hip'):
        return 'rocm', ''
    if not info['cuda'] or not info['gpu']:
        return 'cpu', ''
    needed = info['cuda'].split('.')[0]
    if info.get('nvcc') and info['nvcc'].split('.')[0] == needed:
        return 'cuda', ''
    found = f'nvcc {info["nvcc"]} does not fit' if info.get('nvcc') else 'there is no nvcc'
    return 'cpu', (
        f'NOTE: torch sees a GPU, but {found}, so mmcv gets CPU operators only: NMS and RoIAlign '
        f'on the GPU need the CUDA toolkit {needed}.x (torch was built for {info["cuda"]}); '
        'install it and run `make setup` again.'
    )


def wheel_key(info: Mapping, ops: str, mmcv: str, dist: str = 'mmcv') -> str:
    """Name everything a built mmcv depends on; the cache of pip would ignore torch."""
    parts = [f'{dist}{mmcv}', info['python'], f'torch{info["torch"]}', f'abi{info["abi"]}', ops]
    if ops != 'cpu':
        parts += [f'cuda{info["cuda"]}', info['arch']]
    parts += [info['platform'], info['libc']]
    return re.sub(r'[^\w.+-]+', '_', '-'.join(part for part in parts if part))


def nvcc_version(cuda_home: str | None) -> str:
    """Return the version of the CUDA compiler that torch would use, '' for none."""
    nvcc = Path(cuda_home or '', 'bin', 'nvcc')
    if not cuda_home or not nvcc.exists():
        return ''
    done = subprocess.run([str(nvcc), '--version'], capture_output=True, text=True)
    release = re.search(r'release (\d+\.\d+)', done.stdout)
    return release[1] if release else ''


def build_jobs() -> int:
    """Return how many files to compile at a time: one per core, but 2 GiB of memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return max(1, min(cores or 1, memory // 2**31))


def wheel_cache() -> Path:
    """Return the cache of built wheels, shared by all checkouts of a user."""
    base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return base / 'mmdet_lt' / 'wheels'


def have_wheel(python_tag: str, dist: str = 'mmcv') -> bool:
    """Whether the cache may hold what is needed, so that no compiler is."""
    return any(wheel_cache().glob(f'{dist}{pinned(dist)}-{python_tag}-*/{wheel_glob(dist)}'))


def wheel_glob(dist: str) -> str:
    """Return the pattern of the file names of a distribution's wheels."""
    return f'{dist.replace("-", "_")}-*.whl'


def pins(family: str) -> dict[str, str]:
    """Return the exact pins of requirements/stack.txt or onedl.txt, by distribution."""
    file = {'stock': 'stack', 'onedl': 'onedl'}[family]
    text = (ROOT / 'requirements' / f'{file}.txt').read_text(encoding='utf-8')
    return dict(re.findall(r'^([\w-]+)==(\S+)', text, re.M))


def pinned(name: str) -> str:
    """Return the version of an exact pin."""
    return {**pins('stock'), **pins('onedl')}[name]


def stamp_key(python: tuple[int, ...]) -> str:
    """Hash what a finished set-up depends on."""
    parts = [str(ROOT), '.'.join(map(str, python)), shutil.which('nvcc') or '']
    parts += [os.environ.get(name, '') for name in ('CUDA_HOME', 'MMDET_LT_MMCV_OPS')]
    patterns = ('requirements/*.txt', 'tools/setup_*.py', 'setup.py')
    files = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    data = '\0'.join(parts).encode() + b''.join(path.read_bytes() for path in files)
    return hashlib.sha256(data).hexdigest()[:16]
