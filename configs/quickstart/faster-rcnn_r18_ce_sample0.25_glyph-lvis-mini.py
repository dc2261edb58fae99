# Long-tailed recipe of the demo: repeat-factor sampling. LVIS's threshold of 1e-3 would be 0.05
# here (100 of the 2,000 images); on so short a schedule a stronger one helps common classes, too.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.RepeatFactorSampler', repeat_thr=0.25)
)
