r"""Class activation maps of annotated boxes, for RoI heads and for convolutional dense heads.

Papers: Selvaraju et al., *Grad-CAM*, ICCV 2017, https://arxiv.org/abs/1610.02391; Draelos, Carin,
*HiResCAM*, https://arxiv.org/abs/2011.08891; Zhou et al., *Learning Deep Features for
Discriminative Localization* (CAM), CVPR 2016, https://arxiv.org/abs/1512.04150.

.. math::
    G_{kij} = \frac{\partial z_c}{\partial F_{kij}}, \qquad
    \text{Grad-CAM}_{ij} = \max\Big(0, \sum_k F_{kij} \frac{1}{hw} \sum_{uv} G_{kuv}\Big), \qquad
    \text{HiResCAM}_{ij} = \max\Big(0, \sum_k F_{kij} G_{kij}\Big)

``F`` (K, h, w) are the features of one box, ``z_c`` the logit of its annotated class ``c``.

- RoI heads: ``F`` is what RoIAlign cuts out at the annotated box, ``z_c`` the logit of the (last)
  box head. Rows of a head do not mix, so one backward pass of the head serves all boxes of a batch.
- Dense heads: ``F`` is the input of the last convolution of the class branch, on the level whose
  anchors fit the box best, and ``z_c`` the sum of class ``c``'s logits over all anchors and cells.
  That convolution is linear, so away from the border of the map the gradient is one constant,
  ``G_k = Σ_{a, u, v} W[a, c, k, u, v]``; no backward pass is needed, and both methods are CAM.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mmcv.ops import roi_align
from torch import Tensor, nn

from mmdet_lt.errors import InputError

#: Boxes that go through a head at once; bounds the memory on images with thousands of objects.
MAX_ROIS = 1024
#: Cells a side of the map of one box, for dense heads; RoI heads have their own.
DENSE_SIZE = 7
#: Side of an object on a level of a head without anchors, in strides.
POINT_SCALE = 8.0

METHODS = ('gradcam', 'hirescam')

Features = Sequence[Tensor]


def box_cams(
    model: nn.Module, method: str = 'gradcam'
) -> tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """How to compute the maps of a detector.

    Args:
        model: Detector of MMDetection, in evaluation mode.
        method: 'gradcam' or 'hirescam'.

    Returns:
        'roi' or 'dense', and a function of images (B, 3, H, W), boxes (N, 5) as
        ``image, x1, y1, x2, y2`` in pixels of the images, and labels (N,), that gives float32 maps
        (N, h, w).

    Raises:
        InputError: The detector has no head of a known kind, or the method is unknown.
    """
    if method not in METHODS:
        raise InputError(f'the method of CAMs must be one of {list(METHODS)}, found {method!r}.')
    if getattr(model, 'roi_head', None) is not None:
        head, kind, function = model.roi_head, 'roi', partial(roi_cams, method=method)
        check_roi_head(head)
    elif getattr(model, 'bbox_head', None) is not None:
        head, kind, function = model.bbox_head, 'dense', dense_cams
    else:
        raise InputError(
            f'detector {type(model).__name__} has neither `roi_head` nor `bbox_head`: class '
            'activation maps need a two-stage detector or a convolutional one-stage one.'
        )

    def compute(images: Tensor, rois: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            features = model.extract_feat(images)
        return function(head, features, rois, labels, images.shape[-2:])

    return kind, compute


def check_roi_head(head: Any) -> None:
    """Refuse RoI heads whose box branch needs more than features and boxes.

    Raises:
        InputError: Names the head.
    """
    parameters = inspect.signature(head._bbox_forward).parameters.values()
    needed = {p.name for p in parameters if p.default is p.empty}
    if not needed <= {'stage', 'x', 'rois'}:
        raise InputError(
            f'{type(head).__name__} scores boxes from {sorted(needed)}, not from RoI features '
            'alone: use a Standard, Double or Cascade RoI head for class activation maps.'
        )


def roi_cams(
    head: Any,
    features: Features,
    rois: Tensor,
    labels: Tensor,
    image_size: Any = None,
    method: str = 'gradcam',
) -> Tensor:
    """Maps at the given boxes of an RoI head; see the module's text.

    Args:
        head: RoI head of MMDetection, in evaluation mode.
        features: Pyramid levels, each (B, K, H_l, W_l).
        rois: float (N, 5).
        labels: int64 (N,), classes ``0 .. C - 1``.
        image_size: Not used; both kinds of heads are called alike.
        method: 'gradcam' or 'hirescam'.

    Returns:
        float32 (N, h, w), not negative; h, w of the head's RoI features.
    """
    stages = isinstance(head.bbox_head, nn.ModuleList)
    stage = (len(head.bbox_head) - 1,) if stages else ()
    maps = []
    for part, label in zip(rois.split(MAX_ROIS), labels.split(MAX_ROIS), strict=True):
        with torch.enable_grad():
            # The gradient stops at the RoI features, but they must be part of a graph.
            levels = tuple(level.detach().requires_grad_() for level in features)
            out = head._bbox_forward(*stage, levels, part)
            score = out['cls_score'].gather(1, label[:, None]).sum()
        roi = out['bbox_feats']
        (gradient,) = torch.autograd.grad(score, roi)
        weight = gradient.float()
        if method == 'gradcam':
            weight = weight.mean((2, 3), keepdim=True)
        maps.append((weight * roi.detach().float()).sum(1).relu())
    return torch.cat(maps)


def dense_cams(
    head: Any, features: Features, rois: Tensor, labels: Tensor, image_size: Sequence[int]
) -> Tensor:
    """CAM at the given boxes of a dense head; see the module's text.

    Args:
        head: Dense head of MMDetection, in evaluation mode.
        features: Pyramid levels, each (B, K, H_l, W_l).
        rois: float (N, 5).
        labels: int64 (N,), classes ``0 .. C - 1``.
        image_size: Height and width of the batch in pixels.

    Returns:
        float32 (N, 7, 7), not negative.

    Raises:
        InputError: The class scores do not come from a convolution.
    """
    branches = _class_branches(head, features)
    strides = [image_size[0] / feature.shape[-2] for feature, _ in branches]
    level = assign_levels(rois[:, 1:], level_sides(head, strides))
    maps = rois.new_zeros((len(rois), DENSE_SIZE, DENSE_SIZE))
    for index, (feature, weight) in enumerate(branches):
        here = (level == index).nonzero().squeeze(1)
        if len(here) == 0:
            continue
        size = (DENSE_SIZE, DENSE_SIZE)
        cut = roi_align(feature, rois[here], size, 1 / strides[index], 2, 'avg', True)
        maps[here] = torch.einsum('nkhw,nk->nhw', cut, weight[labels[here]]).relu()
    return maps


@torch.no_grad()
def _class_branches(head: Any, features: Features) -> list[tuple[Tensor, Tensor]]:
    """Of each level: input of the last convolution of the class branch, and ``G``, (C, K)."""
    calls: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
    convs = [m for m in head.modules() if type(m) is nn.Conv2d and m.groups == 1]
    hooks = [
        conv.register_forward_hook(lambda m, args, out: calls.append((m, args[0], out)))
        for conv in convs
    ]
    try:
        scores = head(features)[0]
    finally:
        for hook in hooks:
            hook.remove()
    width = getattr(head, 'cls_out_channels', 0)
    branches = []
    for score in scores if isinstance(scores, (list, tuple)) else ():
        match = next((call for call in calls if call[2] is score), None)
        if match is None or not width or match[0].out_channels % width:
            break
        conv, feature, _ = match
        weight = conv.weight.float().sum((2, 3)).view(-1, width, conv.in_channels).sum(0)
        branches.append((feature.float(), weight))
    if not branches or len(branches) != len(scores):
        raise InputError(
            f'the class scores of {type(head).__name__} do not come straight from a convolution: '
            'class activation maps need a two-stage detector or a head such as RetinaHead, '
            'FCOSHead, ATSSHead or GFLHead.'
        )
    return branches


def level_sides(head: Any, strides: Sequence[float]) -> list[list[float]]:
    """Sides in pixels of the objects each level is made for: those of its anchors if it has any."""
    anchors = getattr(getattr(head, 'prior_generator', None), 'base_anchors', None)
    if anchors is None:
        return [[POINT_SCALE * stride] for stride in strides]
    return [
        ((a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])).clamp(min=0).sqrt().tolist() for a in anchors
    ]


def assign_levels(boxes: Tensor, sides: Sequence[Sequence[float]]) -> Tensor:
    """Level with the nearest side to ``sqrt(w h)`` on a logarithmic scale, int64 (N,).

    Args:
        boxes: ``x1, y1, x2, y2``, float (N, 4).
        sides: Of each level, one or more sides in pixels.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    target = area.clamp(min=1e-6).log() / 2
    distances = [(target[:, None] - target.new_tensor(side).log()).abs().amin(1) for side in sides]
    return torch.stack(distances, 1).argmin(1)
