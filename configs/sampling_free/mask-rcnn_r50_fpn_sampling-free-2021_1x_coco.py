# The generation of 2021: published prior of the RPN, ratios of each iteration, threshold 1e-3.
_base_ = './mask-rcnn_r50_fpn_sampling-free_1x_coco.py'

model = dict(sampling_free=dict(generation='2021'))
