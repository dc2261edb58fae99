"""Mixup of batches: the draw, pixels by hand, boxes, weights, masks, extents."""

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData, PixelData

from mmdet_lt.errors import InputError
from mmdet_lt.models.data_preprocessors.mixup import Mix, blend, draw_mix, mix_samples


def sample(boxes, labels, shape=(32, 32), batch=(64, 64), masks=None, **meta):
    result = DetDataSample(
        metainfo=dict(img_shape=shape, pad_shape=shape, batch_input_shape=batch, **meta)
    )
    fields = {} if masks is None else dict(masks=masks)
    result.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
        **fields,
    )
    return result


@pytest.mark.parametrize('size', [2, 3, 8])
def test_partners_are_one_cycle(size):
    for seed in range(20):
        partner = draw_mix(np.random.default_rng(seed), 1.5, size).partner
        seen, image = [], 0
        for _ in range(size):
            image = partner[image]
            seen.append(image)
        assert sorted(seen) == list(range(size))


def test_lambda_has_the_moments_of_beta():
    rng = np.random.default_rng(0)
    drawn = np.array([draw_mix(rng, 1.5, 2).lam for _ in range(20000)])
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    assert abs(drawn.mean() - 0.5) < 0.01 and abs(drawn.var() - 1 / 16) < 0.002
    assert draw_mix(rng, 1.5, 1) == Mix(1.0, (0,))
    first, again = (draw_mix(np.random.default_rng([3, 0, 7]), 1.5, 4) for _ in range(2))
    assert first == again != draw_mix(np.random.default_rng([3, 0, 8]), 1.5, 4)


def test_pixels_by_hand():
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])[:, None, None]
    mixed = blend(x, Mix(0.25, (1, 2, 0)))
    wanted = [[7.75, 15.5], [77.5, 155.0], [25.75, 51.5]]
    assert mixed.flatten(1).tolist() == wanted
    levels = blend((x, 2 * x), Mix(0.25, (1, 2, 0)))
    assert isinstance(levels, tuple) and torch.equal(levels[1], 2 * mixed)
    assert blend(x, Mix(1.0, (1, 2, 0))) is x
    half = blend(x.half(), Mix(0.25, (1, 2, 0)))
    assert half.dtype == torch.float16 and torch.allclose(half.float(), mixed, rtol=1e-3)


def test_blend_keeps_gradients_of_both():
    x = torch.ones(2, 1, requires_grad=True)
    blend(x, Mix(0.25, (1, 0)))[0].backward()
    assert x.grad.flatten().tolist() == [0.25, 0.75]


def test_boxes_and_weights():
    samples = [
        sample([[0, 0, 8, 8], [4, 4, 20, 20]], [3, 1], shape=(20, 64)),
        sample([], [], shape=(64, 32)),
        sample([[1, 2, 3, 4]], [7], shape=(30, 30)),
    ]
    mix_samples(samples, Mix(0.3, (1, 2, 0)))
    labels = [s.gt_instances.labels.tolist() for s in samples]
    weights = [s.gt_instances.loss_weights.tolist() for s in samples]
    assert labels == [[3, 1], [7], [7, 3, 1]]
    assert weights == [
        pytest.approx([0.3, 0.3]),
        pytest.approx([0.7]),
        pytest.approx([0.3, 0.7, 0.7]),
    ]
    assert sum(map(sum, weights)) == pytest.approx(3)  # every box counts once in the batch
    assert samples[2].gt_instances.bboxes.tolist() == [[1, 2, 3, 4], [0, 0, 8, 8], [4, 4, 20, 20]]
    assert [s.img_shape for s in samples] == [(64, 64), (64, 32), (30, 64)]
    assert samples[0].pad_shape == (64, 64)


def test_two_empty_images():
    samples = [sample([], []), sample([], [])]
    mix_samples(samples, Mix(0.5, (1, 0)))
    assert all(len(s.gt_instances) == 0 for s in samples)
    assert samples[0].gt_instances.loss_weights.shape == (0,)


@pytest.mark.parametrize('lam', [0.0, 1.0])
def test_the_ends_keep_one_image(lam):
    samples = [sample([[0, 0, 8, 8]], [3], shape=(20, 20)), sample([[1, 1, 9, 9]], [5])]
    mix_samples(samples, Mix(lam, (1, 0)))
    assert [s.gt_instances.labels.tolist() for s in samples] == ([[3], [5]] if lam else [[5], [3]])
    assert samples[0].gt_instances.loss_weights.tolist() == [1.0]
    assert samples[0].img_shape == ((20, 20) if lam else (32, 32))


@pytest.mark.parametrize('kind', ['bitmap', 'polygon'])
def test_masks_of_different_sizes(kind):
    def masks(height, width):
        if kind == 'bitmap':
            return BitmapMasks(np.ones((1, height, width), np.uint8), height, width)
        corners = np.array([0, 0, width, 0, width, height, 0, height], dtype=float)
        return PolygonMasks([[corners]], height, width)

    samples = [
        sample([[0, 0, 16, 8]], [0], shape=(8, 16), masks=masks(8, 16)),
        sample([[0, 0, 4, 12]], [1], shape=(12, 4), masks=masks(12, 4)),
    ]
    mix_samples(samples, Mix(0.4, (1, 0)))
    joined = samples[0].gt_instances.masks
    assert (joined.height, joined.width) == (64, 64)
    areas = joined.to_ndarray().sum((1, 2)).tolist()
    assert areas == [8 * 16, 12 * 4]
    assert joined.to_ndarray()[1, :12, :4].all()  # aligned at the top left corner


def test_ignored_regions_and_verified_classes_of_both():
    lists = [([1, 2], [5]), ([2, 3], [])]
    samples = [
        sample([], [], neg_category_ids=absent, not_exhaustive_category_ids=partial)
        for absent, partial in lists
    ]
    for index, item in enumerate(samples):
        item.ignored_instances = InstanceData(bboxes=torch.full((1, 4), float(index)))
    mix_samples(samples, Mix(0.4, (1, 0)))
    assert samples[1].ignored_instances.bboxes[:, 0].tolist() == [1, 0]
    assert samples[0].neg_category_ids == [2] and samples[0].not_exhaustive_category_ids == [5]


def test_refuses_what_it_cannot_mix():
    samples = [sample([], []), sample([], [])]
    for item in samples:
        item.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, 4, 4))
    with pytest.raises(InputError, match='gt_sem_seg'):
        mix_samples(samples, Mix(0.4, (1, 0)))
