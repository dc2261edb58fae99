# RetinaNet as published, with its heuristic: focal loss and its bias of 0.01.
_base_ = [
    '../_base_/models/retinanet_r18-w16_fpn_128px.py',
    '../_base_/datasets/glyph_lvis_mini.py',
    '../_base_/schedules/glyph_iter.py',
    '../_base_/iter_runtime.py',
]
