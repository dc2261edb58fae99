# Repeat-factor sampling with softmax cross entropy.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.RepeatFactorSampler', repeat_thr=1e-3)
)
