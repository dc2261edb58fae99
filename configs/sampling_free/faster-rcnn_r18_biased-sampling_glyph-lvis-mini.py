# Faster R-CNN as published, with its heuristic: biased sampling in RPN and RoI head.
_base_ = '../quickstart/faster-rcnn_r18_ce_random_glyph-lvis-mini.py'
