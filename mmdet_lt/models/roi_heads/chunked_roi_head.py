"""An RoI head for thousands of proposals: features are made in chunks and not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmdet.models.roi_heads import StandardRoIHead
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdet_lt.errors import InputError
from mmdet_lt.registry import MODELS


@MODELS.register_module()
class ChunkedRoIHead(StandardRoIHead):
    """:class:`StandardRoIHead` whose memory does not grow with the RoI features.

    Boxes (and masks) go through RoIAlign and head in chunks of ``chunk_size`` rows, whose inner
    activations are computed again in the backward pass. Scores and box deltas of all rows, on which
    the losses work, are kept: losses see one call with all rows as always, so running statistics
    count each row once. Losses and gradients are those of the stock head.

    Without gradients the chunks are not checkpointed. RoI features are not handed on.

    Args:
        chunk_size: Rows of a chunk.
        kwargs: Arguments of :class:`StandardRoIHead`.

    Raises:
        InputError: ``chunk_size`` below 1, heads that train batch norm (its statistics would be
            those of a chunk, counted twice), a mask head that shares the box features, or
            predictions that are no tensors.
    """

    def __init__(self, *args: Any, chunk_size: int = 1024, **kwargs: Any) -> None:
        if type(chunk_size) is not int or chunk_size < 1:
            raise InputError(
                '`model.roi_head.chunk_size` must be a whole number of at least 1, found '
                f'{chunk_size!r}.'
            )
        super().__init__(*args, **kwargs)
        self.chunk_size = chunk_size
        if self.with_mask and self.share_roi_extractor:
            raise InputError(
                'ChunkedRoIHead does not keep box features for the mask head: give '
                '`model.roi_head.mask_roi_extractor`.'
            )

    def _bbox_forward(self, x: tuple[Tensor, ...], rois: Tensor) -> dict[str, Any]:
        def part(rows: Tensor) -> tuple[Tensor, Tensor]:
            results = super(ChunkedRoIHead, self)._bbox_forward(x, rows)
            return results['cls_score'], results['bbox_pred']

        cls_score, bbox_pred = self._in_chunks(part, rois)
        return dict(cls_score=cls_score, bbox_pred=bbox_pred, bbox_feats=None)

    def _mask_forward(
        self,
        x: tuple[Tensor, ...],
        rois: Tensor | None = None,
        pos_inds: Tensor | None = None,
        bbox_feats: Tensor | None = None,
    ) -> dict[str, Any]:
        def part(rows: Tensor) -> tuple[Tensor]:
            return (super(ChunkedRoIHead, self)._mask_forward(x, rows)['mask_preds'],)

        (mask_preds,) = self._in_chunks(part, rois)
        return dict(mask_preds=mask_preds, mask_feats=None)

    def _in_chunks(self, part: Callable[[Tensor], tuple], rois: Tensor) -> tuple:
        """Apply ``part`` to the chunks of ``rois`` and join each of its results."""
        training = torch.is_grad_enabled()
        if training:
            self._refuse_batch_norm()
        pieces = []
        for rows in rois.split(self.chunk_size):
            piece = checkpoint(part, rows, use_reentrant=False) if training else part(rows)
            pieces.append(piece)
        return tuple(_join(column) for column in zip(*pieces, strict=True))

    def _refuse_batch_norm(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise InputError(
                    f'`model.roi_head.{name}` trains batch norm, whose statistics would be those '
                    'of a chunk: use `norm_cfg=dict(type="GN", num_groups=32)` or StandardRoIHead.'
                )


def _join(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    if parts[0] is None:  # a head without classifier or without regressor
        return None
    if not isinstance(parts[0], Tensor):
        raise InputError(
            f'ChunkedRoIHead joins tensors, found {type(parts[0]).__name__} from the box head: use '
            '`model.roi_head.type=StandardRoIHead`.'
        )
    return torch.cat(parts)
