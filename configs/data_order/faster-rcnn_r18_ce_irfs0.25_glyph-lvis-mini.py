# Instance-aware repeat factors (IRFS), with the threshold of the demo's RFS.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.InstanceAwareRepeatFactorSampler', repeat_thr=0.25)
)
