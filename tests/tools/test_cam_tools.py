"""The tools of CAM-based sampling: extract, browse, train with the result."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
from tool_helpers import REPO, clean_environment, run_tool

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'cam'))
from cam_toy import cam_config, make_toy_coco, save_checkpoint  # noqa: E402

from mmdet_lt.cam.store import CAMFile  # noqa: E402

ANN_FILE = 'train_dataloader.dataset.ann_file'
PASTE = dict(type='mmdet_lt.CAMPaste')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Toy data, a config, weights and, once extracted, CAMs."""
    folder = tmp_path_factory.mktemp('cam_tools')
    make_toy_coco(folder / 'data', num_images=6)
    cfg = cam_config(folder / 'data')
    cfg.dump(folder / 'config.py')
    save_checkpoint(cfg, folder / 'a.pth')
    return folder


@pytest.fixture
def cams(root, call):
    path = root / 'a.cams'
    if not path.exists():
        assert call('cam/extract_cams', root / 'config.py', root / 'a.pth', '--out', path)[0] == 0
    return path


def test_extract(cams):
    assert len(CAMFile(cams)) == 12


@pytest.mark.parametrize(
    ('words', 'part'),
    [
        (('config.py', 'no.pth', '--out', 'x.cams'), 'no.pth'),
        (('no.py', 'a.pth', '--out', 'x.cams'), 'no.py'),
        (('config.py', 'https://a/b.pth', '--out', 'x.cams'), 'a local file, found https'),
        (('config.py', 'a.pth', '--out', 'x', '--batch-size', '0'), 'found 0'),
        (
            (
                'config.py',
                'a.pth',
                '--out',
                'x',
                '--cfg-options',
                'train_dataloader.dataset.ann_file=n.json',
            ),
            'n.json expected, found nothing',
        ),
    ],
)
def test_extract_refuses(root, call, monkeypatch, words, part):
    monkeypatch.chdir(root)
    status, lines = call('cam/extract_cams', *words)
    assert status == 2 and part in lines[-1] and lines[-1].startswith('error: ')
    assert not (root / 'x.cams').exists()


def test_browse(root, cams, call, tmp_path):
    sizes = []
    for name, words in {
        'cam.png': ('--cams', cams, '--checkpoint', root / 'a.pth'),
        'plain.png': ('--cams', cams),
        'box.jpg': ('--mask-source', 'box'),
    }.items():
        out = tmp_path / name
        status, lines = call('cam/browse', root / 'config.py', *words, '--num', 3, '--out', out)
        assert status == 0, lines
        image = cv2.imread(str(out))
        sizes.append(image.shape)
        assert image.std() > 30
    assert sizes[0][1] > sizes[1][1] == sizes[2][1]  # one more column: the activation maps


def test_browse_refuses(root, cams, call, tmp_path):
    save_checkpoint(cam_config(root / 'data'), tmp_path / 'b.pth', seed=4)
    config, out = root / 'config.py', tmp_path / 'a.png'
    for words, part in (
        ((config, '--out', out), 'needs `train_dataloader.sampler.cams`'),
        ((config, '--cams', tmp_path / 'no.cams', '--out', out), 'no.cams expected'),
        ((config, '--cams', cams, '--checkpoint', tmp_path / 'b.pth', '--out', out), 'b.pth'),
        ((config, '--cams', cams, '--out', tmp_path / 'a.txt'), 'ending in .png'),
        ((config, '--cams', cams, '--num', 0, '--out', out), 'at least one row'),
    ):
        status, lines = call('cam/browse', *words)
        assert status == 2 and part in lines[-1] and not out.exists()


def training(root, cams, sampler, paste=True):
    cfg = cam_config(root / 'data')
    steps = cfg.train_dataloader.dataset.pipeline
    if paste:
        steps.insert(2, PASTE)
    cfg.train_dataloader.sampler = sampler
    cfg.custom_hooks = [dict(type='mmdet_lt.DeferredRebalancingHook', epoch=1)]
    cfg.train_cfg.max_epochs = 2
    return cfg


def test_train(root, cams, call, tmp_path):
    """Two epochs with the deferred sampler, by workers that live through both."""
    sampler = dict(type='mmdet_lt.CAMSampler', cams=str(cams), checkpoint=str(root / 'a.pth'))
    cfg = training(root, cams, sampler)
    cfg.train_dataloader.num_workers = 1
    cfg.train_dataloader.persistent_workers = True
    cfg.dump(tmp_path / 'train.py')
    status, lines = call('train', tmp_path / 'train.py', '--work-dir', tmp_path / 'run')
    assert status == 0, lines
    assert (tmp_path / 'run' / 'epoch_2.pth').is_file()


def test_training_refuses_before_it_starts(root, cams, call, tmp_path):
    plain = dict(type='DefaultSampler', shuffle=True)
    good = dict(type='mmdet_lt.CAMSampler', cams=str(cams))
    for k, (sampler, paste, part) in enumerate(
        (
            (dict(good, cams='no.cams'), True, 'no.cams expected'),
            (good, False, 'needs one mmdet_lt.CAMPaste'),
            (plain, True, 'mmdet_lt.CAMSampler'),
        )
    ):
        cfg = training(root, cams, sampler, paste)
        cfg.custom_hooks = []
        cfg.train_dataloader.num_workers = 1
        cfg.dump(tmp_path / f'{k}.py')
        status, lines = call('train', tmp_path / f'{k}.py', '--work-dir', tmp_path / f'run{k}')
        assert status == 2 and part in lines[-1]
        assert lines[-1].startswith('error: ') and 'Traceback' not in lines[-1]
        assert not list((tmp_path / f'run{k}').glob('*.pth'))


@pytest.mark.slow
def test_real_kill_and_two_processes(tmp_path):
    """SIGKILL in one process, continued by two: the file of an undisturbed process."""
    folder = tmp_path / 'data'
    make_toy_coco(folder, num_images=160)
    cfg = cam_config(folder)
    checkpoint = save_checkpoint(cfg, tmp_path / 'a.pth')
    cfg.dump(tmp_path / 'config.py')
    tool = 'tools/cam/extract_cams.py'
    words = [tmp_path / 'config.py', checkpoint, '--batch-size', '2', '--out']
    threads = {'OMP_NUM_THREADS': '1', 'MMDET_LT_NUM_THREADS': '1'}
    done = run_tool(tool, *words, 'one.cams', cwd=tmp_path, **threads)
    assert done.returncode == 0, done.stderr
    assert '320 masks of 160 images' in done.stdout and 'one.cams (' in done.stdout
    part = tmp_path / 'two.cams.parts' / 'rank-0000.jsonl'
    command = [sys.executable, REPO / tool, *words, 'two.cams']
    run = subprocess.Popen(
        [str(word) for word in command],
        cwd=tmp_path,
        env=clean_environment(**threads),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    limit = time.monotonic() + 100
    while not (part.is_file() and part.stat().st_size > 500):
        assert run.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert part.is_file() and not (tmp_path / 'two.cams').exists()
    launcher = ('tools/torchrun.py', '--nproc_per_node=2', '--master_port=0')
    two = (*launcher, REPO / tool, *words, 'two.cams', '--launcher', 'pytorch')
    done = run_tool(*two, cwd=tmp_path, **threads)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'two.cams').read_bytes() == (tmp_path / 'one.cams').read_bytes()
