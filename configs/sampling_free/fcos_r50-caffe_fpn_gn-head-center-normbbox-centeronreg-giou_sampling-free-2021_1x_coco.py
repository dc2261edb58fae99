# The generation of 2021: published prior, ratio of 100 iterations, learned uncertainty.
_base_ = './fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_sampling-free_1x_coco.py'

model = dict(sampling_free=dict(generation='2021'))
