# Square-root sampling: between uniform and class-balanced.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

train_dataloader = dict(sampler=dict(_delete_=True, type='mmdet_lt.SquareRootSampler'))
