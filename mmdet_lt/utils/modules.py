"""Modules of a model."""

from __future__ import annotations

from mmengine.model import is_model_wrapper
from torch import nn


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside of the wrapper of distributed training, if there is one."""
    return model.module if is_model_wrapper(model) else model
