# Effective class-margin loss (ECM) with repeat-factor sampling, as in the paper.
_base_ = './mask-rcnn_r50_fpn_ecm_random-ms-1x_lvis-v1.py'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.RepeatFactorSampler', repeat_thr=1e-3)
)
