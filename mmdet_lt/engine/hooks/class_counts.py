"""Compare model, loss and data set before the first iteration of a training or test run."""

from __future__ import annotations

from mmdet.models.roi_heads.bbox_heads import BBoxHead
from torch import nn

from mmdet_lt.engine.hooks._config_keys import config_key
from mmdet_lt.engine.hooks._head_surroundings import check_places
from mmdet_lt.engine.hooks.head_checks import check_head
from mmdet_lt.errors import InputError
from mmdet_lt.models.losses.base import LongTailLoss
from mmdet_lt.statistics import ClassStatistics


def check_class_counts(
    model: nn.Module, stats: ClassStatistics | None, by_epoch: bool = True
) -> None:
    """Every head with a classification loss must have as many classes as the data set.

    Also refuses a head that cannot be used with its loss (:func:`check_head`), a loss of this
    package in another place than ``loss_cls``, and a dense head whose classifier has another width
    than one of our losses needs: that happens when ``use_sigmoid`` is not written in the config,
    the only place where such heads look.

    Args:
        model: The detector.
        stats: Those of the training set; None in a test run, which has none: heads and losses are
            then compared with each other alone.
        by_epoch: Whether the training loop counts epochs.

    Raises:
        InputError: With the counts of head, loss and data set, or the head to use, and the keys.
    """
    check_places(model)
    for name, head in model.named_modules():
        loss = getattr(head, 'loss_cls', None)
        if not isinstance(loss, nn.Module):
            continue
        of_rpn = 'rpn_head' in name.split('.')
        in_head = getattr(head, 'num_classes', None)
        if not isinstance(in_head, int):
            if isinstance(loss, LongTailLoss):
                raise InputError(
                    f'{type(head).__name__} (`{config_key(name)}`) has no `num_classes`, which '
                    f'{loss.name} needs: give the head one, or a loss of MMDetection.'
                )
            continue
        if not of_rpn:
            _check_counts(name, head, loss, stats)
        check_head(model, name, head, by_epoch, of_rpn)
        of_roi = isinstance(head, BBoxHead)  # where `cls_out_channels` may be a hidden layer's
        width = getattr(head, 'classifier_columns', getattr(head, 'cls_out_channels', None))
        if hasattr(loss, 'dense_columns') and isinstance(width, int) and not of_roi:
            _check_dense_width(config_key(name), loss, width, in_head)


def _check_counts(
    name: str, head: nn.Module, loss: nn.Module, stats: ClassStatistics | None
) -> None:
    in_head, in_data = head.num_classes, None if stats is None else stats.num_classes
    in_loss = getattr(loss, 'given_num_classes', getattr(loss, 'num_classes', None))
    if in_head == (in_head if in_data is None else in_data) and in_loss in (None, in_head):
        return
    key = config_key(name)
    loss_part = f'`{key}.loss_cls.num_classes` is {in_loss}'
    if in_loss is None:
        loss_part = f'`{key}.loss_cls` ({type(loss).__name__}) has no count of its own'
    data_part = ''
    if stats is not None:
        data_part = f', the classes of `train_dataloader.dataset` ({stats.source}) are {in_data}'
    raise InputError(
        f'class counts disagree: `{key}.num_classes` is {in_head}, {loss_part}{data_part}: '
        'make them equal.'
    )


def _check_dense_width(key: str, loss: nn.Module, width: int, num_classes: int) -> None:
    wanted = loss.dense_columns(num_classes)
    if wanted is None:
        raise InputError(
            f'{type(loss).__name__} in `{key}.loss_cls` needs {num_classes + loss.extra_columns} '
            f'columns, a dense head has at most {num_classes + 1}: use it in an RoI head such as '
            'Shared2FCBBoxHead.'
        )
    if width != wanted:
        raise InputError(
            f'the classifier of `{key}` has {width} columns for {num_classes} classes, '
            f'{type(loss).__name__} needs {wanted}: write '
            f'`{key}.loss_cls.use_sigmoid={loss.sigmoid}` in the config.'
        )
