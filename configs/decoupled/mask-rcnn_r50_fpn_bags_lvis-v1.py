# Balanced group softmax (BAGS), second stage: a new classifier on a frozen Mask R-CNN, images drawn
# uniformly, 12 epochs, as in the authors' code.
_base_ = '../lvis/mask-rcnn_r50_fpn_group-softmax_random-ms-1x_lvis-v1.py'
