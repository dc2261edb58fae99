"""The CAM file and the parts of an unfinished one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmdet_lt.cam.masks import encode
from mmdet_lt.cam.shards import Shards
from mmdet_lt.cam.store import CAMFile, write_cams
from mmdet_lt.errors import InputError

HEADER = dict(classes=['a', 'b'], annotation_digest='x')


def entries(ids, seed=0):
    rng = np.random.default_rng(seed)
    kept, coded = {}, []
    for annotation_id in ids:
        mask = rng.random(rng.integers(1, 30, 2)) < 0.5
        kept[annotation_id] = mask
        coded.append((annotation_id, *mask.shape, encode(mask)))
    return kept, coded


@pytest.mark.parametrize('ids', [[7], [5, 3, 2**40, 11], range(500, 0, -1)])
def test_round_trip(tmp_path, ids):
    kept, coded = entries(ids)
    write_cams(tmp_path / 'a.cams', HEADER, coded)
    cams = CAMFile(tmp_path / 'a.cams')
    assert len(cams) == len(kept) and cams.ids.tolist() == sorted(kept)
    assert cams.classes == ('a', 'b') and cams.header['annotation_digest'] == 'x'
    for annotation_id, mask in kept.items():
        assert (cams.mask(annotation_id) == mask).all()
    assert cams.contains(np.array([-1, *kept, 4])).tolist() == [
        False,
        *[True] * len(kept),
        4 in kept,
    ]
    with pytest.raises(KeyError):
        cams.mask(10**6)


def test_no_masks_at_all(tmp_path):
    write_cams(tmp_path / 'a.cams', HEADER, [])
    cams = CAMFile(tmp_path / 'a.cams')
    assert len(cams) == 0 and not cams.contains(np.array([1])).any()


def test_two_masks_of_one_id(tmp_path):
    with pytest.raises(InputError, match='annotation id 3 occurs twice'):
        write_cams(tmp_path / 'a.cams', HEADER, entries([1, 3])[1] + entries([3])[1])
    assert list(tmp_path.glob('a.cams*')) == []


def test_bad_files(tmp_path):
    path = tmp_path / 'a.cams'
    with pytest.raises(InputError, match='expected, found nothing there: correct `my.key`'):
        CAMFile(path, 'my.key')
    with pytest.raises(InputError, match='found a folder'):
        CAMFile(tmp_path)
    for text in ('', 'not json\n', '[1]\n', '{"format": "other"}\n'):
        path.write_text(text)
        with pytest.raises(InputError, match='no CAM file of format'):
            CAMFile(path)
    write_cams(path, HEADER, entries(range(9))[1])
    whole = path.read_bytes()
    for cut in (whole[:-1], whole + b'x', whole[: len(whole) // 2]):
        path.write_bytes(cut)
        with pytest.raises(InputError, match=f'should have {len(whole)} bytes, found {len(cut)}'):
            CAMFile(path)


def test_parts_survive_a_torn_line(tmp_path):
    shards = Shards(tmp_path / 'a.cams')
    assert shards.prepare(HEADER) == {}
    _, coded = entries(range(6))
    shards.append(0, 0, coded[:2], 1)
    shards.append(1, 2, [], 0)  # opens one file a process; here the first rank's
    shards.append(0, 1, coded[2:], 2)
    shards.close()
    path = next(shards.folder.glob('rank-*.jsonl'))
    with open(path, 'ab') as file:
        file.write(b'{"chunk":3,"fl')
    done = shards.prepare(HEADER)
    assert sorted(done) == [0, 1, 2] and path.read_bytes().endswith(b'}\n')
    assert list(shards.chunks(done)) == [(coded[:2], 1), (coded[2:], 2), ([], 0)]


def test_parts_of_another_extraction(tmp_path):
    shards = Shards(tmp_path / 'a.cams')
    shards.prepare(HEADER)
    other = dict(HEADER, annotation_digest='y')
    with pytest.raises(InputError, match='annotation_digest was x and is now y'):
        shards.prepare(other)
    assert json.loads((shards.folder / 'header.json').read_text()) == HEADER
