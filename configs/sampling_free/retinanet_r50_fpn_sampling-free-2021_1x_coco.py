# The generation of 2021: published priors, ratio of 100 iterations, learned uncertainty.
_base_ = './retinanet_r50_fpn_sampling-free_1x_coco.py'

model = dict(sampling_free=dict(generation='2021'))
