"""Windows, resampling, thresholds and run-length codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdet_lt.cam import masks
from mmdet_lt.errors import InputError


@pytest.mark.parametrize(
    ('box', 'window'),
    [
        ((2, 3, 6, 9), (2, 3, 6, 9)),
        ((2.2, 3.9, 6.1, 9.0), (2, 3, 7, 9)),
        ((-3, -1, 4, 50), (0, 0, 4, 10)),  # cut at an image of 10 x 20
        ((5.2, 5.2, 5.4, 5.4), (5, 5, 6, 6)),  # a box inside of one pixel
        ((20, 0, 25, 5), None),
        ((3, -7, 5, 0), None),
    ],
)
def test_box_window(box, window):
    assert masks.box_window(box, 10, 20) == window


@pytest.mark.parametrize(('rows', 'columns'), [(7, 7), (5, 3), (2, 9)])
def test_resample_is_bilinear(rows, columns):
    """On a box of whole pixels it equals torch's interpolation."""
    cam = torch.rand(rows, columns)
    found = masks.resample(cam.numpy(), (3, 4, 23, 37), (3, 4, 23, 37))
    expected = F.interpolate(cam[None, None], (33, 20), mode='bilinear', align_corners=False)
    np.testing.assert_allclose(found, expected[0, 0].numpy(), rtol=1e-5, atol=1e-6)


def test_resample_by_hand():
    """Two cells over four pixels: centres at 0.5, ..., cells at pixel 1 and 3."""
    found = masks.resample(np.array([[0.0, 1.0]]), (0, 0, 4, 1), (0, 0, 4, 1))
    np.testing.assert_allclose(found, [[0, 0.25, 0.75, 1]])


def test_resample_of_a_box_cut_by_the_image():
    """The window shows the right part of the map, not the whole map squeezed into it."""
    cam = np.random.default_rng(0).random((4, 4))
    whole = masks.resample(cam, (-6, 0, 10, 8), (-6, 0, 10, 8))
    cut = masks.resample(cam, (-6, 0, 10, 8), (0, 0, 10, 8))
    np.testing.assert_allclose(cut, whole[:, 6:], rtol=1e-6)


def test_one_cell():
    assert (masks.resample(np.array([[2.0]]), (0, 0, 3, 2), (0, 0, 3, 2)) == 2).all()


def test_threshold_by_hand():
    """Mean 3: 3 itself belongs to the foreground. At 0.6 of the mean 2 does, too."""
    values = np.array([[0.0, 1.0, 2.0], [3.0, 5.0, 7.0]])
    mask, flat = masks.foreground(values)
    assert mask.tolist() == [[False, False, False], [True, True, True]] and not flat
    assert masks.foreground(values, 0.6)[0].tolist() == [[False, False, True], [True, True, True]]
    # A multiple above the maximum leaves the maximum, never nothing.
    assert masks.foreground(values, 10)[0].sum() == 1


@pytest.mark.parametrize('value', [0.0, 0.1, 1e-30, 3e7])
def test_flat_maps_take_the_whole_box(value):
    mask, flat = masks.foreground(np.full((3, 5), value, dtype=np.float32))
    assert flat and mask.all()


def test_run_length_round_trip():
    rng = np.random.default_rng(1)
    for height, width in ((1, 1), (1, 9), (13, 1), (31, 17)):
        for share in (0.0, 0.3, 1.0):
            mask = rng.random((height, width)) < share
            assert (masks.decode(masks.encode(mask), height, width) == mask).all()


def test_segmentations():
    square = np.zeros((8, 10), dtype=bool)
    square[2:5, 3:7] = True
    compressed = dict(size=[8, 10], counts=masks.encode(square))
    text = dict(size=[8, 10], counts=masks.encode(square).decode())
    runs, last = [0], False  # uncompressed: lengths of runs in columns, off first
    for value in square.T.reshape(-1):
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    for value in (compressed, text, dict(size=[8, 10], counts=runs), [[3, 2, 7, 2, 7, 5, 3, 5]]):
        assert masks.is_segmentation(value)
        assert (masks.segmentation_mask(value, 8, 10) == square).all()
    # A polygon of two points beside a good one is left out, alone it is none.
    assert not masks.is_segmentation([[1, 2, 3, 4]])
    odd = [[1, 2, 3, 4], [3, 2, 7, 2, 7, 5, 3, 5]]
    assert (masks.segmentation_mask(odd, 8, 10) == square).all()
    for nothing in (None, [], {}, dict(size=[8, 10])):
        assert not masks.is_segmentation(nothing)


def test_segmentation_of_another_image():
    with pytest.raises(InputError, match=r'\[8, 10\].*\[10, 8\]'):
        masks.segmentation_mask(dict(size=[8, 10], counts='abc'), 10, 8)
