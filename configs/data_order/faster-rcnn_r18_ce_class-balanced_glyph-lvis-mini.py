# Class-balanced sampling: every class is drawn equally often.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

train_dataloader = dict(sampler=dict(_delete_=True, type='mmdet_lt.ClassBalancedSampler'))
