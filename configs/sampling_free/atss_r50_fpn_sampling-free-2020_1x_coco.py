# The generation of 2020: measured prior, ratio of each iteration, one threshold.
_base_ = './atss_r50_fpn_sampling-free_1x_coco.py'

model = dict(sampling_free=dict(generation='2020'))
