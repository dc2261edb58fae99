# EQLv2 with repeat-factor sampling.
_base_ = './mask-rcnn_r50_fpn_eqlv2_random-ms-1x_lvis-v1.py'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.RepeatFactorSampler', repeat_thr=1e-3)
)
