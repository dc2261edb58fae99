"""Tiny detectors with one loss, as training starts with them."""

import torch
from mmdet.registry import MODELS
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope

from mmdet_lt.engine.compatibility.cell import STATISTICS, quiet
from mmdet_lt.engine.compatibility.families import tiny_config
from mmdet_lt.engine.hooks.class_statistics_hook import prepare_model
from mmdet_lt.registration import register_all


def build(family, loss, adapted=True, use_sigmoid=True, change=None, **options):
    """A detector in training mode, checked and initialised."""
    register_all()
    init_default_scope('mmdet')
    MessageHub.get_instance('heads').update_info('epoch', 0)
    MessageHub.get_current_instance().update_info('epoch', 0)
    torch.manual_seed(0)
    options = dict(type=f'mmdet_lt.{loss}', use_sigmoid=use_sigmoid, **options)
    config = tiny_config(family, options, adapted)
    if change is not None:
        change(config)
    with quiet():
        model = MODELS.build(config)
        prepare_model(model, STATISTICS)
        model.init_weights()
    return model.train()


class Calls:
    """What a module was called with, and what it gave."""

    def __init__(self, module):
        self.args, self.outputs, self.counting = [], [], []
        self.handle = module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module, args, kwargs, output):
        self.args.append((args, kwargs))
        self.outputs.append(output)
        self.counting.append(module.training)
