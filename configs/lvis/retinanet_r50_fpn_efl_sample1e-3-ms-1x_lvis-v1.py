# Equalized focal loss (EFL) with repeat-factor sampling, as in the paper. The paper's detector also
# has ATSS targets, an IoU branch and 24 epochs.
_base_ = './retinanet_r50_fpn_efl_random-ms-1x_lvis-v1.py'

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.RepeatFactorSampler', repeat_thr=1e-3)
)
