"""Compare model, loss and data set before the first iteration."""

from __future__ import annotations

from mmdet.models.roi_heads.bbox_heads import BBoxHead
from torch import nn

from mmdet_lt.engine.hooks._config_keys import config_key
from mmdet_lt.engine.hooks.head_checks import check_head
from mmdet_lt.errors import InputError
from mmdet_lt.statistics import ClassStatistics


def check_class_counts(model: nn.Module, stats: ClassStatistics, by_epoch: bool = True) -> None:
    """Every head with a classification loss must have as many classes as the data set.

    Also refuses a head that cannot be used with its loss (:func:`check_head`), and a dense head
    whose classifier has another width than one of our losses needs: that happens when
    ``use_sigmoid`` is not written in the config, the only place where such heads look.

    Args:
        model: The detector.
        stats: Those of the training set.
        by_epoch: Whether the training loop counts epochs.

    Raises:
        InputError: With the counts of head, loss and data set, or the head to use, and the keys.
    """
    for name, head in model.named_modules():
        loss = getattr(head, 'loss_cls', None)
        if 'rpn_head' in name.split('.') or not isinstance(loss, nn.Module):
            continue
        in_head = getattr(head, 'num_classes', None)
        in_loss = getattr(loss, 'given_num_classes', getattr(loss, 'num_classes', None))
        if not isinstance(in_head, int):
            continue
        if in_head != stats.num_classes or (in_loss is not None and in_loss != in_head):
            key = config_key(name)
            loss_part = f'`{key}.loss_cls.num_classes` is {in_loss}'
            if in_loss is None:
                loss_part = f'`{key}.loss_cls` ({type(loss).__name__}) has no count of its own'
            raise InputError(
                f'class counts disagree: `{key}.num_classes` is {in_head}, {loss_part}, the '
                f'classes of `train_dataloader.dataset` ({stats.source}) are {stats.num_classes}: '
                'make them equal.'
            )
        check_head(model, name, head, by_epoch)
        of_roi = isinstance(head, BBoxHead)  # where `cls_out_channels` may be a hidden layer's
        width = getattr(head, 'classifier_columns', getattr(head, 'cls_out_channels', None))
        if hasattr(loss, 'dense_columns') and isinstance(width, int) and not of_roi:
            _check_dense_width(config_key(name), loss, width, in_head)


def _check_dense_width(key: str, loss: nn.Module, width: int, num_classes: int) -> None:
    wanted = loss.dense_columns(num_classes)
    if wanted is None:
        raise InputError(
            f'{type(loss).__name__} in `{key}.loss_cls` needs {num_classes + loss.extra_columns} '
            f'columns, a dense head has at most {num_classes + 1}: use it in an RoI head.'
        )
    if width != wanted:
        raise InputError(
            f'the classifier of `{key}` has {width} columns for {num_classes} classes, '
            f'{type(loss).__name__} needs {wanted}: write '
            f'`{key}.loss_cls.use_sigmoid={loss.sigmoid}` in the config.'
        )
