# The generation of 2020: measured prior, ratio of each iteration, one threshold.
_base_ = './fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_sampling-free_1x_coco.py'

model = dict(sampling_free=dict(generation='2020'))
