# Progressively-balanced sampling over the whole training: 750 iterations of 8 images.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.ProgressivelyBalancedSampler', max_samples=750 * 8)
)
