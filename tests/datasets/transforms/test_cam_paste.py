"""CAMPaste on pixels: what changes, what stays, and how annotations follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks

from mmdet_lt.cam.masks import encode
from mmdet_lt.datasets._paste import hidden_share, tight_window, warp
from mmdet_lt.datasets.paste_request import PasteIndex, PasteRequest
from mmdet_lt.datasets.transforms.cam_paste import CAMPaste
from mmdet_lt.errors import InputError

HEIGHT, WIDTH = 40, 50
BOX = (10, 8, 22, 18)  # 12 x 10 pixels
STILL = dict(flip_prob=0, rotation=0, scale=(1, 1), translate=False)


def source_image():
    return np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def ellipse():
    """Foreground in the window of BOX: a blob that does not touch every pixel of it."""
    y, x = np.mgrid[:10, :12]
    return ((y - 4.5) / 5) ** 2 + ((x - 5.5) / 6) ** 2 <= 1


def request(foreground=None, seed=0, **changes):
    mask = ellipse() if foreground is None else foreground
    given = dict(
        img_path='source.png',
        height=HEIGHT,
        width=WIDTH,
        box=BOX,
        label=2,
        source='cam',
        mask=(*mask.shape, encode(mask)),
        seed=seed,
    )
    return PasteRequest(**{**given, **changes})


def results(boxes=((30, 20, 45, 35),), masks=True, flags=None, shape=(HEIGHT, WIDTH)):
    """A record as after LoadAnnotations; masks fill their boxes."""
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    record = dict(
        img=np.full((*shape, 3), 100, dtype=np.uint8),
        gt_bboxes=HorizontalBoxes(torch.from_numpy(boxes)),
        gt_bboxes_labels=np.arange(len(boxes), dtype=np.int64),
        gt_ignore_flags=np.asarray(flags or [False] * len(boxes), dtype=bool),
    )
    if masks:
        bits = np.zeros((len(boxes), *shape), dtype=np.uint8)
        for k, (x0, y0, x1, y1) in enumerate(boxes.astype(int)):
            bits[k, y0:y1, x0:x1] = 1
        record['gt_masks'] = BitmapMasks(bits, *shape)
    return record


def paste(record=None, asked=None, image=None, **options):
    step = CAMPaste(**{**STILL, **options})
    step.bind(lambda info: dict(info, img=source_image() if image is None else image))
    record = results() if record is None else record
    record['sample_idx'] = PasteIndex(5, asked or request())
    return step.transform(record)


def boxes_of(record):
    return record['gt_bboxes'].tensor.tolist()


def test_identity_copies_the_foreground_and_nothing_else():
    before = results()['img']
    after = paste()
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[8:18, 10:22] = ellipse()
    assert (after['img'][mask] == source_image()[mask]).all()
    assert (after['img'][~mask] == before[~mask]).all()
    assert (after['gt_masks'].masks[1] == mask).all()
    assert boxes_of(after) == [[30, 20, 45, 35], [10, 8, 22, 18]]
    assert after['gt_bboxes_labels'].tolist() == [0, 2]
    assert after['gt_bboxes_labels'].dtype == np.int64
    assert after['gt_ignore_flags'].tolist() == [False, False]
    assert after['gt_ignore_flags'].dtype == bool and type(after['sample_idx']) is int


def test_black_pixels_belong_to_the_object():
    black = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for options in ({}, dict(rotation=30, scale=(0.9, 1.1), flip_prob=0.5, translate=True)):
        after = paste(image=black, **options)
        mask = after['gt_masks'].masks[-1].astype(bool)
        assert mask.sum() > 60 and (after['img'][mask] == 0).all()
        assert (after['img'][~mask] == 100).all()


@pytest.mark.parametrize('seed', range(12))
def test_random_transforms_keep_the_record_consistent(seed):
    """Outside of the pasted mask no pixel changes; boxes are those of the masks, in bounds."""
    record = results(((0, 0, 20, 20), (15, 10, 49, 39), (30, 2, 42, 9)))
    before = record['img'].copy()
    old = record['gt_masks'].masks.copy()
    after = paste(
        record,
        request(seed=seed),
        flip_prob=0.5,
        rotation=45,
        scale=(0.5, 2.5),
        translate=True,
        max_hidden=1,
    )
    masks = after['gt_masks'].masks.astype(bool)
    pasted = masks[-1]
    assert pasted.any() and (after['img'][~pasted] == before[~pasted]).all()
    assert len(masks) == len(boxes_of(after)) == len(after['gt_bboxes_labels']) == 4
    assert len(after['gt_ignore_flags']) == 4 and after['gt_bboxes_labels'][-1] == 2
    for mask, box in zip(masks, boxes_of(after), strict=True):
        x0, y0, x1, y1 = box
        assert 0 <= x0 < x1 <= WIDTH and 0 <= y0 < y1 <= HEIGHT
        assert tight_window(mask) == tuple(box)
    for mask, former in zip(masks[:-1], old, strict=True):
        assert (mask == (former.astype(bool) & ~pasted)).all()


def test_the_seed_decides():
    random = dict(flip_prob=0.5, rotation=45, scale=(0.8, 1.2), translate=True)
    one, same, other = (paste(asked=request(seed=s), **random)['img'] for s in (4, 4, 5))
    assert (one == same).all() and (one != other).any()


def test_hidden_parts_are_lost():
    """The blob covers the left part of an object: its mask shrinks and its box moves in."""
    full = np.ones((10, 12), dtype=bool)
    after = paste(results(((16, 8, 30, 18), (0, 30, 5, 35))), request(full))
    masks = after['gt_masks'].masks
    assert boxes_of(after) == [[22, 8, 30, 18], [0, 30, 5, 35], [10, 8, 22, 18]]
    assert masks[0].sum() == 80 and not masks[0][:, :22].any() and masks[1].sum() == 25


@pytest.mark.parametrize('masks', [True, False])
@pytest.mark.parametrize(('width', 'kept'), [(17, False), (18, True)])
def test_objects_hidden_too_much_are_removed(masks, width, kept):
    """12 of 17 columns are 71 %, of 18 they are 67 %; crowds are treated alike."""
    full = np.ones((10, 12), dtype=bool)
    record = results(((10, 8, 10 + width, 18), (0, 30, 5, 35)), masks, flags=[True, False])
    after = paste(record, request(full), max_hidden=0.7)
    labels, flags = after['gt_bboxes_labels'].tolist(), after['gt_ignore_flags'].tolist()
    assert labels == ([0] if kept else []) + [1, 2]
    assert flags == ([True] if kept else []) + [False, False]
    assert len(boxes_of(after)) == len(labels)
    if kept:  # without masks nobody knows which part is left
        assert boxes_of(after)[0] == ([22, 8, 28, 18] if masks else [10, 8, 28, 18])


def test_nothing_left_is_removed_even_if_hiding_is_allowed():
    record = results(((12, 10, 20, 16),))
    after = paste(record, request(np.ones((10, 12), dtype=bool)), max_hidden=1)
    assert after['gt_bboxes_labels'].tolist() == [2] and len(after['gt_masks']) == 1


def test_an_object_without_mask_pixels_counts_by_its_box():
    """LoadAnnotations gives crowds and broken polygons an empty mask."""
    record = results(((12, 10, 20, 16), (30, 30, 40, 39)), flags=[True, True])
    record['gt_masks'].masks[:] = 0
    after = paste(record, request(np.ones((10, 12), dtype=bool)))
    assert after['gt_bboxes_labels'].tolist() == [1, 2]
    assert boxes_of(after)[0] == [30, 30, 40, 39]


def test_boxes_that_lose_nothing_keep_their_fractions():
    after = paste(results(((30.25, 20.5, 45.75, 35.125),)))
    assert boxes_of(after)[0] == [30.25, 20.5, 45.75, 35.125]


def test_polygons_become_bitmaps():
    record = results(((30, 20, 45, 35),), masks=False)
    polygon = np.array([30.0, 20, 45, 20, 45, 35, 30, 35])
    record['gt_masks'] = PolygonMasks([[polygon]], HEIGHT, WIDTH)
    after = paste(record)
    assert isinstance(after['gt_masks'], BitmapMasks) and after['gt_masks'].masks.shape[0] == 2
    assert after['gt_masks'].masks[0].sum() == 225


@pytest.mark.parametrize('masks', [True, False])
def test_an_image_without_objects(masks):
    after = paste(results((), masks))
    assert after['gt_bboxes_labels'].tolist() == [2] and boxes_of(after) == [[10, 8, 22, 18]]


def test_plain_arrays_as_boxes():
    record = results()
    record['gt_bboxes'] = record['gt_bboxes'].tensor.numpy()
    assert paste(record)['gt_bboxes'].tolist() == [[30, 20, 45, 35], [10, 8, 22, 18]]


def test_flip_by_hand():
    after = paste(flip_prob=1)
    window = after['img'][8:18, 10:22]
    mask = ellipse()
    assert (window[mask[:, ::-1]] == source_image()[8:18, 10:22][:, ::-1][mask[:, ::-1]]).all()


def test_quarter_turn_by_hand():
    """Counter-clockwise about the centre; shapes swap and pixels are those of numpy's rot90."""
    rng = np.random.default_rng(0)
    crop = rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)
    mask = np.ones((6, 10), dtype=bool)
    mask[0, :3] = False
    pixels, turned = warp(crop, mask, angle=90)
    assert (turned == np.rot90(mask)).all() and (pixels == np.rot90(crop)).all()


def test_scale_by_hand():
    crop = np.full((8, 8, 3), 7, dtype=np.uint8)
    pixels, mask = warp(crop, np.ones((8, 8), dtype=bool), scale=1.5)
    assert mask.shape == (12, 12) and mask.all() and (pixels == 7).all()
    _, mask = warp(crop, np.ones((8, 8), dtype=bool), scale=0.5)
    assert mask.shape == (4, 4) and mask.all()
    # Two pixels at a tenth of their size are less than one: they are kept as they are.
    _, mask = warp(crop[:1, :2], np.ones((1, 2), dtype=bool), scale=0.1)
    assert mask.any()


def test_too_large_for_the_image():
    """A smaller background: the object is scaled down until it fits."""
    for angle in (0, 45):
        record = results((), shape=(6, 9))
        after = paste(record, rotation=angle, scale=(2, 2), translate=True)
        (x0, y0, x1, y1) = boxes_of(after)[0]
        assert 0 <= x0 < x1 <= 9 and 0 <= y0 < y1 <= 6
        assert after['gt_masks'].masks.shape == (1, 6, 9)


def test_translation_reaches_every_place():
    full = np.ones((10, 12), dtype=bool)
    corners = {
        tuple(
            boxes_of(paste(results((), False, shape=(11, 14)), request(full, s), translate=True))[0]
        )
        for s in range(80)
    }
    assert corners == {(x, y, x + 12, y + 10) for x in range(3) for y in range(2)}


def test_crowded_places_are_avoided():
    """One corner is free: with many tries the object lands there, with one it need not."""
    full = np.ones((10, 12), dtype=bool)
    boxes = ((0, 0, 50, 25), (0, 25, 30, 40))

    def hidden(tries):
        count = 0
        for seed in range(20):
            after = paste(
                results(boxes, masks=False),
                request(full, seed),
                translate=True,
                max_overlap=0.02,
                tries=tries,
            )
            x0, y0, *_ = boxes_of(after)[-1]
            count += not (x0 >= 29 and y0 >= 23)  # 2 % of the boxes may be hidden
        return count

    assert hidden(400) == 0 and hidden(1) > 10


def test_one_of_applies_one():
    """Flip, move, turn: each alone, each sometimes."""
    seen = set()
    step = CAMPaste(flip_prob=0.5, rotation=45, one_of=True)
    for seed in range(200):
        flip, angle, scale, move = step._draw(np.random.default_rng(seed))
        turned = (angle, scale) != (0.0, 1.0)
        assert flip + turned + move == 1
        seen.add((flip, turned, move))
    assert len(seen) == 3
    # In place: a flipped object hides itself, the old one is removed.
    record = results((BOX,))
    mask = np.ones((10, 12), dtype=bool)
    after = paste(record, request(mask, label=0), flip_prob=1, one_of=True)
    assert boxes_of(after) == [list(BOX)] and after['gt_bboxes_labels'].tolist() == [0]
    assert (after['img'][8:18, 10:22] == source_image()[8:18, 10:22][:, ::-1]).all()


def test_sources():
    polygon = [[10, 8, 22, 8, 22, 18, 10, 18, 10, 13, 16, 13]]
    by_mask = paste(asked=request(source='mask', mask=polygon))
    by_box = paste(asked=request(source='box', mask=None))
    assert by_box['gt_masks'].masks[1].sum() == 120
    assert 60 < by_mask['gt_masks'].masks[1].sum() < 120
    assert boxes_of(by_mask)[1] == list(BOX)
    # A segmentation without a pixel in its box: nothing to paste.
    outside = [[30, 30, 40, 30, 40, 38]]
    after = paste(asked=request(source='mask', mask=outside))
    assert len(boxes_of(after)) == 1 and (after['img'] == 100).all()


def test_hidden_share_at_the_border():
    """Boxes that stick out of the pasted window on each side."""
    mask = np.ones((4, 4), dtype=bool)
    boxes = np.array([[2, 2, 6, 6], [0, 0, 40, 40], [6, 6, 10, 10], [8, 0, 9, 9], [7.5, 7.5, 9, 9]])
    found = hidden_share((4, 4, 8, 8), mask, boxes)
    np.testing.assert_allclose(found, [4 / 16, 16 / 1600, 4 / 16, 0, 1 / 4])


def test_images_without_request_pass():
    step = CAMPaste()
    step.bind(lambda info: pytest.fail('nothing to load'))
    record = dict(results(), sample_idx=PasteIndex(3))
    image = record['img']
    assert step.transform(record) is record and record['img'] is image
    assert len(record['gt_bboxes_labels']) == 1
    # MMDetection draws another image itself when one cannot be used: a plain number.
    assert len(step.transform(dict(results(), sample_idx=3))['gt_bboxes_labels']) == 1


def test_without_the_sampler():
    with pytest.raises(InputError, match='mmdet_lt.CAMSampler.*found another sampler'):
        CAMPaste().transform(dict(results(), sample_idx=3))


def test_a_source_image_of_another_size():
    with pytest.raises(InputError, match=r'source.png should be 40 x 50.*\(4, 5\)'):
        paste(image=np.zeros((4, 5, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        (dict(flip_prob=1.5), '`flip_prob`.*probability.*1.5'),
        (dict(rotation=-1), '`rotation`.*180'),
        (dict(scale=(2, 1)), '`scale`.*low <= high'),
        (dict(scale=(0, 1)), '`scale`'),
        (dict(max_overlap=-1), '`max_overlap`'),
        (dict(max_hidden=2), '`max_hidden`'),
        (dict(tries=0), '`tries`.*at least 1'),
    ],
)
def test_bad_arguments(options, sentence):
    with pytest.raises(InputError, match=sentence):
        CAMPaste(**options)
