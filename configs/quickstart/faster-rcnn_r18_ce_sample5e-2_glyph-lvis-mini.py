# Long-tailed recipe of the demo: repeat-factor sampling. A threshold of 0.05 of the 2,000 images is
# 100 images, what LVIS's 1e-3 is for its 100,000.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.RepeatFactorSampler', repeat_thr=0.05)
)
