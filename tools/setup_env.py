"""Make the Python environment that this checkout needs; uses the standard library only.

The active environment is completed when it holds torch, else ``.venv`` is created. Run it with
``make setup``. The choices are explained in docs/installation.md. With ``--onedl`` an environment
of its own, ``.venv-onedl``, gets the onedl forks in place of the originals.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import setup_checks as checks
from setup_checks import ONEDL_VENV, ROOT, VENV, Stop

STEP = re.compile(r'^\s*(Collecting|Downloading|Building wheel|Installing collected)(.*)')
NINJA = re.compile(r'^\s*\[(\d+)/(\d+)\]')


class Log:
    """Prints steps with the elapsed time; the full output of the commands goes to a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.start, self.tty = path, time.monotonic(), sys.stdout.isatty()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{sys.version}\n', encoding='utf-8')

    def clock(self) -> str:
        seconds = int(time.monotonic() - self.start)
        return f'[{seconds // 60:2d}:{seconds % 60:02d}]'

    def say(self, text: str, end: str = '\n') -> None:
        print('\r\033[K' * self.tty + f'{self.clock()} {text}', end=end, flush=True)

    def run(self, title: str, command: list[str], hint: str, **env: str) -> str:
        """Run a command, show that it lives, return its output; stop with ``hint`` on failure."""
        self.say(title)
        lines: list[str] = []
        state = ['']
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, 'PIP_DISABLE_PIP_VERSION_CHECK': '1', 'PIP_USER': '0', **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        )

        def pump() -> None:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(f'\n{self.clock()} $ {" ".join(command)}\n')
                for line in process.stdout:
                    file.write(line)
                    lines.append(line)
                    step, ninja = STEP.match(line), NINJA.match(line)
                    if ninja:
                        state[0] = f'compiled {ninja[1]} of {ninja[2]} files'
                    elif step:
                        state[0] = ''.join(step.groups())[:70]

        reader = threading.Thread(target=pump, daemon=True)
        reader.start()
        try:
            # pip shows no bars in a pipe, so a sign of life comes from here.
            while reader.is_alive():
                reader.join(1 if self.tty else 20)
                if reader.is_alive():
                    self.say(f'  {state[0] or title}', end='' if self.tty else '\n')
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
        if self.tty:
            print('\r\033[K', end='', flush=True)
        if code:
            print(''.join(lines[-15:]).rstrip(), file=sys.stderr)
            raise Stop(f'{hint} (the full output is in {os.path.relpath(self.path)}).')
        return ''.join(lines)


def probe(python: Path, code: str = checks.PROBE, arguments: tuple = tuple(checks.DISTS)) -> dict:
    """Ask an interpreter about itself."""
    done = subprocess.run([str(python), '-c', code, *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
        raise Stop(f'{python} does not work ({reason}): remove or repair that environment.')
    return json.loads(done.stdout.splitlines()[-1])


def choose_python(onedl: bool = False) -> Path:
    """Return the interpreter to use: the active environment's if it has torch, else .venv's.

    That of the forks is always .venv-onedl's: they share their import names with the originals.
    """
    if onedl:
        return ONEDL_VENV / 'bin' / 'python'
    active = os.environ.get('VIRTUAL_ENV') or os.environ.get('CONDA_PREFIX')
    python = Path(active or VENV) / 'bin' / 'python'
    if active and python.exists() and python.parent.parent.resolve() != VENV.resolve():
        if 'torch' in probe(python)['dists']:
            return python
    return VENV / 'bin' / 'python'


def create_venv(log: Log, venv: Path) -> None:
    """Create an environment with the interpreter that runs this script."""
    version = f'{sys.version_info[0]}.{sys.version_info[1]}'
    log.run(
        f'create {venv.name} with Python {version}',
        [sys.executable, '-m', 'venv', '--clear', str(venv)],
        f'Python cannot create {venv.name}: install its venv module, on Debian and Ubuntu with '
        f'`apt-get install python{version}-venv`',
    )


def install_packages(log: Log, python: Path, found: dict, family: str) -> None:
    """Install torch (where there is none), the pure packages and those of a family but mmcv.

    ``family`` is 'stock', 'onedl', or '' where the user's own forks are there already.
    """
    dists = found['dists']
    names = ['build', 'runtime', 'dev'] + ['stack_deps'] * bool(family)
    names += ['onedl_deps'] * (family == 'onedl')
    names += ['opencv'] * (not found['cv2'])
    pip = [str(python), '-m', 'pip', 'install']
    limits = ['setuptools<81', f'torch=={dists.get("torch", checks.TORCH)}']
    if checks.version_tuple(limits[1])[:2] < (2, 3):
        limits.append('numpy<2')  # torch before 2.3 was compiled against NumPy 1
    with tempfile.TemporaryDirectory() as folder:
        limit_file = Path(folder) / 'constraints.txt'
        limit_file.write_text('\n'.join(limits) + '\n', encoding='utf-8')
        command = [*pip, '-c', str(limit_file), 'torch']
        for name in names:
            command += ['-r', str(ROOT / 'requirements' / f'{name}.txt')]
        what = 'packages' if 'torch' in dists else f'torch {checks.TORCH} and packages'
        log.run(f'install {what}', command, 'pip could not install the packages')
    pins = checks.pins(family) if family else {}
    pure = [name for name in pins if not name.endswith('mmcv') and name not in dists]
    wanted = [f'{name}=={pins[name]}' for name in pure]
    if wanted:
        command = [*pip, '--no-deps', '--no-build-isolation', *wanted]
        log.run(f'install {" and ".join(wanted)}', command, 'pip could not install them')


def wheel_folder(key: str) -> Path:
    """Return the folder of one kind of wheel in the cache."""
    folder = checks.wheel_cache() / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # no home directory to write to
        folder = ROOT / 'work_dirs' / 'wheels' / key
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def build_wheel(log: Log, python: Path, folder: Path, ops: str, again: bool, dist: str) -> Path:
    """Build mmcv or its fork from source into ``folder``; others may be doing the same."""
    checks.check_compiler(probe(python)['include'])
    jobs = checks.build_jobs()
    # setuptools replaces its own flags by these, so optimisation has to be named. No debug
    # information: it would add half to the time of the build.
    flags = f'-O2 -DNDEBUG -g0 {os.environ.get("CXXFLAGS", "")}'.strip()
    cuda = {'FORCE_CUDA': '0', 'CUDA_VISIBLE_DEVICES': ''} if ops == 'cpu' else {'FORCE_CUDA': '1'}
    with tempfile.TemporaryDirectory(dir=folder) as part:
        command = [str(python), '-m', 'pip', 'wheel', '-v', '--no-build-isolation', '--no-deps']
        command += ['--no-cache-dir', '-w', part, f'{dist}=={checks.pinned(dist)}']
        command += ['--no-binary', dist] * again
        log.run(
            f'build {dist} with {ops} operators, {jobs} files at once (about 5 minutes on 2 cores)',
            command,
            f'{dist} could not be built',
            # torch looks for ninja on PATH and compiles file by file without it.
            PATH=f'{python.parent}{os.pathsep}{os.environ.get("PATH", "")}',
            MAX_JOBS=os.environ.get('MAX_JOBS', str(jobs)),
            CFLAGS=flags,
            CXXFLAGS=flags,
            **cuda,
        )
        built = next(Path(part).glob(checks.wheel_glob(dist)))
        os.replace(built, folder / built.name)  # atomic: no one installs half a wheel
    return folder / built.name


def ops_work(python: Path, ops: str) -> bool:
    """Whether the compiled operators of mmcv load and run with the torch of this environment."""
    code = checks.OPS_PROBE.format(devices=['cpu', 'cuda'] if ops == 'cuda' else ['cpu'])
    return not subprocess.run([str(python), '-c', code], capture_output=True).returncode


def install_mmcv(log: Log, python: Path, dists: dict, earlier: str, dist: str) -> str:
    """Install an mmcv that fits torch; return the key of our wheel, '' for a foreign one."""
    info = probe(python, checks.TORCH_PROBE, ())
    info['nvcc'] = checks.nvcc_version(info['cuda_home'])
    ops, remark = checks.choose_ops(info)
    if remark:
        log.say(remark)
    key = checks.wheel_key(info, ops, checks.pinned(dist), dist)
    present = [name for name in ('mmcv', 'onedl-mmcv') if name in dists]
    if present and earlier in ('', key):
        log.say(f'check the operators of {present[0]} {dists[present[0]]}')
        if ops_work(python, ops if earlier else 'cpu'):
            return earlier
        if present[0] != dist:
            raise Stop(f'{present[0]} does not work with torch {info["torch"]}: install its build.')
    folder = wheel_folder(key)
    for again in (False, True):
        wheel = next(folder.glob(checks.wheel_glob(dist)), None)
        if wheel and not again:
            log.say(f'reuse the {dist} wheel built earlier ({ops} operators)')
        else:
            wheel = build_wheel(log, python, folder, ops, again, dist)
        command = [str(python), '-m', 'pip', 'install', '--no-deps', '--force-reinstall']
        log.run(f'install {dist}', [*command, str(wheel)], f'pip could not install {dist}')
        if ops_work(python, ops):
            return key
        log.say(f'the operators of {wheel.name} do not work with torch {info["torch"]}')
    raise Stop(f'{dist} was built but does not work with torch {info["torch"]}: see {log.path}.')


def prepare(log: Log, python: Path, dist: str) -> dict:
    """Return what is in the environment, after creating our own if it is missing or broken."""
    venv = python.parent.parent
    own = venv in (VENV, ONEDL_VENV)
    found = None
    if python.exists():
        try:
            found = probe(python)
        except Stop:
            if not own:
                raise
    if found is None:
        checks.check_python(sys.version_info[:3], sys.executable)
        if not checks.have_wheel(sys.implementation.cache_tag, dist):
            checks.check_compiler(sysconfig.get_paths()['include'])  # now, not after the download
        create_venv(log, venv)
        found = probe(python)
    checks.check_python(found['python'], venv.name if own else f'The active environment ({python})')
    if not own:
        checks.check_torch(found['dists']['torch'])
    return found


def main() -> None:
    onedl = '--onedl' in sys.argv[1:]
    python = choose_python(onedl)
    if '--print-python' in sys.argv[1:]:
        print(python)
        return
    log = Log(ROOT / 'work_dirs' / ('setup-onedl.log' if onedl else 'setup.log'))
    dist = 'onedl-mmcv' if onedl else 'mmcv'
    found = prepare(log, python, dist)
    # An interrupted set-up leaves an environment of ours half filled: it is completed.
    if onedl:
        family = 'onedl'
    else:
        family = '' if checks.check_stack(found['dists']) == 'onedl' else 'stock'
    stamp = Path(found['prefix']) / 'mmdet_lt_setup.json'
    old = json.loads(stamp.read_text(encoding='utf-8')) if stamp.exists() else {}
    key = checks.stamp_key(found['python'])
    if old.get('key') == key and old.get('dists') == found['dists']:
        return
    if not found['pip']:
        log.run(
            'install pip',
            [str(python), '-m', 'ensurepip'],
            f'{python} has no pip: install it there',
        )
    install_packages(log, python, found, family)
    wheel = install_mmcv(log, python, probe(python)['dists'], old.get('wheel', ''), dist)
    command = [str(python), '-m', 'pip', 'install', '--no-deps', '--no-build-isolation']
    log.run('install mmdet_lt', [*command, '-e', str(ROOT)], 'mmdet_lt could not be installed')
    imports = f'import {", ".join(checks.IMPORTS)}'
    hint = 'a package was installed but cannot be imported: uninstall and reinstall it'
    log.run('check that everything imports', [str(python), '-c', imports], hint)
    record = {'key': key, 'dists': probe(python)['dists'], 'wheel': wheel}
    stamp.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')
    log.say(f'the environment is ready: {python.parent.parent}')


if __name__ == '__main__':
    try:
        main()
    except Stop as stop:
        sys.exit(f'\nerror: {stop}')
    except KeyboardInterrupt:
        sys.exit('\nerror: interrupted; run the same command again to go on.')
