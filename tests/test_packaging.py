"""The packaging files agree with each other, and the set-up refuses with clear sentences."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

INFO = {
    'python': 'cpython-311',
    'torch': '2.13.0+cpu',
    'cuda': None,
    'hip': None,
    'gpu': False,
    'arch': '',
    'abi': 1,
    'platform': 'linux-x86_64',
    'libc': 'glibc-2.36',
    'nvcc': '',
}
GPU_INFO = {**INFO, 'torch': '2.13.0', 'cuda': '13.0', 'gpu': True, 'arch': 'sm90'}


@pytest.fixture(scope='module')
def checks():
    sys.path.insert(0, str(ROOT / 'tools'))
    try:
        import setup_checks

        yield setup_checks
    finally:
        sys.path.remove(str(ROOT / 'tools'))


@pytest.fixture(scope='module')
def setup_env(checks):
    import setup_env

    return setup_env


def requirements(name: str) -> dict[str, str]:
    """Return the lines of a requirements file, by normalised distribution name."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text(encoding='utf-8').splitlines()
    lines = [line for line in lines if line and not line.startswith('#')]
    return {re.match(r'[\w.-]+', line)[0].lower().replace('_', '-'): line for line in lines}


@pytest.fixture(scope='module')
def metadata(tmp_path_factory) -> list[str]:
    """The metadata that setup.py produces, from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp('copy')
    for name in ('setup.py', 'pyproject.toml', 'LICENSE', 'MANIFEST.in'):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / 'requirements', copy / 'requirements')
    for name in ('mmdet_lt/version.py', 'mmdet_lt/__init__.py', 'configs/a.py', 'tools/b.sh'):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text('')
    shutil.copy(ROOT / 'mmdet_lt' / 'version.py', copy / 'mmdet_lt')
    # -S -E would lose setuptools; a torch that fails to import proves that setup.py needs none.
    (copy / 'torch.py').write_text('raise RuntimeError("setup.py must not import torch")\n')
    command = [sys.executable, 'setup.py', '-q', 'egg_info', 'build_py', '--build-lib', 'out']
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packed = {str(path.relative_to(copy / 'out')) for path in (copy / 'out').rglob('*.*')}
    assert {'mmdet_lt/.mim/configs/a.py', 'mmdet_lt/.mim/tools/b.sh'} <= packed
    return (copy / 'mmdet_lt.egg-info' / 'PKG-INFO').read_text(encoding='utf-8').splitlines()


def test_version_is_the_one_of_the_version_file(metadata):
    text = (ROOT / 'mmdet_lt' / 'version.py').read_text(encoding='utf-8')
    scope: dict = {}
    exec(text, scope)
    assert f'Version: {scope["__version__"]}' in metadata
    assert re.match(r'\d+\.\d+\.\d+', scope['__version__'])
    changelog = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert f'## {scope["__version__"]}' in changelog


def test_metadata_lists_the_runtime_requirements(metadata):
    required = [line.split(': ', 1)[1] for line in metadata if line.startswith('Requires-Dist')]
    plain = {re.match(r'[\w.-]+', line)[0].lower() for line in required if 'extra ==' not in line}
    assert plain == set(requirements('runtime'))
    extras = {line.split(': ')[1] for line in metadata if line.startswith('Provides-Extra')}
    assert extras == {'stock', 'onedl', 'dev'}
    assert not plain & {'torch', 'mmcv', 'mmdet', 'mmengine', 'opencv-python'}


def test_requirements_txt_includes_every_file_but_the_stack():
    text = (ROOT / 'requirements.txt').read_text(encoding='utf-8')
    included = set(re.findall(r'^-r requirements/(\w+)\.txt', text, re.M))
    files = {path.stem for path in (ROOT / 'requirements').glob('*.txt')}
    assert included == files - {'stack', 'onedl', 'onedl_deps'}


def test_stack_pins_are_in_the_ranges_that_are_accepted(checks):
    pins = {name: checks.pinned(name) for name in requirements('stack')}
    assert pins == {'mmcv': '2.1.0', 'mmengine': '0.10.7', 'mmdet': '3.3.0'}
    assert checks.check_stack(pins) == 'stock'


def test_python_range_is_the_same_everywhere(checks, metadata):
    line = next(line for line in metadata if line.startswith('Requires-Python: '))
    assert {part.strip() for part in line.split(': ')[1].split(',')} == {'>=3.10', '<3.13'}
    makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
    assert '(3, 10) <= sys.version_info[:2] <= (3, 12)' in makefile
    assert checks.PYTHON_RANGE == ((3, 10), (3, 12))


def test_ruff_has_its_version_in_one_place():
    assert '==' in requirements('dev')['ruff']
    for name in ('.pre-commit-config.yaml', 'pyproject.toml', 'Makefile'):
        assert not re.search(r'ruff\S*\d+\.\d+', (ROOT / name).read_text(encoding='utf-8'))


@pytest.mark.parametrize('version', [(3, 10, 0), (3, 11, 7), (3, 12, 1)])
def test_supported_python(checks, version):
    checks.check_python(version)


@pytest.mark.parametrize('version', [(3, 9, 18), (3, 13, 0), (2, 7, 18)])
def test_unsupported_python(checks, version):
    with pytest.raises(checks.Stop, match=rf'Python {version[0]}\.{version[1]}, but 3\.10 to'):
        checks.check_python(version)


def test_torch_range(checks):
    for version in ('2.1.0', '2.6.0+cu124', '2.13.0+cpu'):
        checks.check_torch(version)
    for version in ('1.13.1', '2.0.1', '2.14.0'):
        with pytest.raises(checks.Stop, match='2.1 to 2.13'):
            checks.check_torch(version)


@pytest.mark.parametrize(
    ('dists', 'sentence'),
    [
        (
            {'mmcv': '2.2.0', 'mmdet': '3.3.0'},
            'found mmcv 2.2.0, mmdet 3.3.0; expected mmcv >=2.0.0,<2.2.0',
        ),
        ({'mmcv': '2.2.0'}, 'found mmcv 2.2.0; expected mmcv .*mmdet >=3.3.0'),
        ({'mmdet': '2.28.2'}, 'found mmdet 2.28.2; expected'),
        ({'mmcv-lite': '2.1.0'}, 'no compiled operators'),
        ({'mmcv-full': '1.7.2'}, 'mmcv 1.x'),
        ({'mmcv': '2.1.0', 'onedl-mmdetection': '3.5.1'}, 'mixes OpenMMLab packages'),
        ({'onedl-mmcv': '2.3.6'}, 'install onedl-mmengine, onedl-mmdetection'),
    ],
)
def test_packages_that_do_not_fit(checks, dists, sentence):
    with pytest.raises(checks.Stop, match=sentence) as error:
        checks.check_stack(dists)
    assert '\n' not in str(error.value)


def test_packages_that_fit(checks):
    forks = {'onedl-mmcv': '2.3.6', 'onedl-mmengine': '0.10.12', 'onedl-mmdetection': '3.5.1'}
    assert checks.check_stack({}) == 'stock'
    assert checks.check_stack({'torch': '2.1.2', 'mmcv': '2.0.1'}) == 'stock'
    assert checks.check_stack(forks) == 'onedl'


def test_missing_compiler(checks, monkeypatch, tmp_path):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(checks.Stop, match='No C.. compiler .c.. is not on PATH'):
        checks.check_compiler('')


@pytest.mark.skipif(not (shutil.which('gcc') and shutil.which('c++')), reason='no compiler')
def test_missing_headers(checks, monkeypatch, tmp_path):
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.delenv('CPLUS_INCLUDE_PATH', raising=False)
    with pytest.raises(checks.Stop, match='Python.h is missing'):
        checks.check_compiler(str(tmp_path))
    include = sysconfig.get_paths()['include']
    if Path(include, 'Python.h').exists():
        checks.check_compiler(include)


def test_choice_of_operators(checks, monkeypatch):
    monkeypatch.delenv('MMDET_LT_MMCV_OPS', raising=False)
    assert checks.choose_ops({**INFO, 'nvcc': '13.0'}) == ('cpu', '')
    assert checks.choose_ops({**GPU_INFO, 'gpu': False}) == ('cpu', '')
    assert checks.choose_ops({**GPU_INFO, 'nvcc': '13.1'}) == ('cuda', '')
    for nvcc in ('', '12.4'):
        ops, remark = checks.choose_ops({**GPU_INFO, 'nvcc': nvcc})
        assert ops == 'cpu' and 'CUDA toolkit 13.x' in remark
    monkeypatch.setenv('MMDET_LT_MMCV_OPS', 'cpu')
    assert checks.choose_ops({**GPU_INFO, 'nvcc': '13.1'}) == ('cpu', '')


def test_wheel_key_tells_builds_apart(checks):
    def key(**change) -> str:
        info = {**GPU_INFO, **change}
        return checks.wheel_key(info, change.pop('ops', 'cuda'), '2.1.0')

    changes = [
        {'torch': '2.12.0'},
        {'cuda': '12.8'},
        {'python': 'cpython-312'},
        {'arch': 'sm80'},
        {'abi': 0},
        {'libc': 'glibc-2.28'},
        {'ops': 'cpu'},
    ]
    keys = {key(), *(key(**change) for change in changes)}
    assert len(keys) == len(changes) + 1
    assert all(re.fullmatch(r'[\w.+-]+', name) for name in keys)
    assert key() == key()


def test_stamp_key_follows_python_and_requirements(checks, monkeypatch, tmp_path):
    (tmp_path / 'requirements').mkdir()
    (tmp_path / 'setup.py').write_text('')
    runtime = tmp_path / 'requirements' / 'runtime.txt'
    runtime.write_text('numpy\n')
    monkeypatch.setattr(checks, 'ROOT', tmp_path)
    first = checks.stamp_key([3, 11, 7])
    assert first == checks.stamp_key((3, 11, 7)) != checks.stamp_key((3, 12, 1))
    runtime.write_text('numpy<3\n')
    assert checks.stamp_key((3, 11, 7)) != first


def test_active_environment_is_used_only_with_torch(setup_env, monkeypatch, tmp_path):
    (tmp_path / 'bin').mkdir()
    python = tmp_path / 'bin' / 'python'
    python.touch()
    monkeypatch.delenv('CONDA_PREFIX', raising=False)
    monkeypatch.setenv('VIRTUAL_ENV', str(tmp_path))
    monkeypatch.setattr(setup_env, 'probe', lambda _: {'dists': {'torch': '2.6.0'}})
    assert setup_env.choose_python() == python
    monkeypatch.setattr(setup_env, 'probe', lambda _: {'dists': {}})
    assert setup_env.choose_python() == setup_env.VENV / 'bin' / 'python'
    monkeypatch.setenv('VIRTUAL_ENV', str(setup_env.VENV))
    assert setup_env.choose_python() == setup_env.VENV / 'bin' / 'python'


def test_forks_have_an_environment_of_their_own(setup_env, checks, monkeypatch, tmp_path):
    monkeypatch.setenv('VIRTUAL_ENV', str(tmp_path))  # not used, not even with torch in it
    python = setup_env.choose_python(onedl=True)
    assert python == ROOT / '.venv-onedl' / 'bin' / 'python'
    done = subprocess.run(
        [sys.executable, 'tools/setup_env.py', '--onedl', '--print-python'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(python) and done.returncode == 0
    pins = {name: version for name, version in checks.pins('onedl').items() if name != 'imaug'}
    assert set(pins) == set(checks.ONEDL) and checks.check_stack(pins) == 'onedl'


def test_forks_are_installed_without_their_dependencies(setup_env, monkeypatch, tmp_path):
    commands = []
    log = setup_env.Log(tmp_path / 'setup.log')
    monkeypatch.setattr(log, 'run', lambda title, command, *_, **__: commands.append(command))
    found = {'dists': {'torch': '2.13.0', 'onedl-mmengine': '0.10.12'}, 'cv2': True}
    setup_env.install_packages(log, Path('python'), found, 'onedl')
    files = {word for word in commands[0] if word.endswith('.txt')}
    for name in ('stack_deps', 'onedl_deps'):
        assert str(ROOT / 'requirements' / f'{name}.txt') in files
    assert '--no-deps' in commands[1]
    assert commands[1][-2:] == ['onedl-mmdetection==3.5.1', 'imaug==0.4.3']
    setup_env.install_packages(log, Path('python'), found, '')  # the user's own forks
    assert len(commands) == 3 and 'stack_deps.txt' not in ' '.join(commands[2])


def test_wheels_of_mmcv_and_its_fork_are_told_apart(checks):
    assert checks.wheel_glob('onedl-mmcv') == 'onedl_mmcv-*.whl'
    keys = {checks.wheel_key(INFO, 'cpu', '2.3.6', dist) for dist in ('mmcv', 'onedl-mmcv')}
    assert len(keys) == 2


def test_failed_step_is_one_sentence(setup_env, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = setup_env.Log(tmp_path / 'setup.log')
    code = 'print("useful line"); raise SystemExit(3)'
    with pytest.raises(setup_env.Stop, match='^It failed .*setup.log.*') as error:
        log.run('try', [sys.executable, '-c', code], 'It failed')
    assert '\n' not in str(error.value)
    assert 'useful line' in capsys.readouterr().err
    assert 'useful line' in log.path.read_text(encoding='utf-8')


SCRIPTS = [ROOT / '.ci' / 'run', *sorted((ROOT / 'tools').glob('**/*.sh'))]


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    done = subprocess.run(['bash', '-n', str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.access(script, os.X_OK), f'{script.name} is not executable'
