# Baseline of the demo: softmax cross entropy, images drawn uniformly.
_base_ = [
    '../_base_/models/faster-rcnn_r18-w16_fpn_128px.py',
    '../_base_/datasets/glyph_lvis_mini.py',
    '../_base_/schedules/glyph_iter.py',
    '../_base_/iter_runtime.py',
]
