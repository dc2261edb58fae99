# No heuristic and nothing in its place: all anchors, all proposals, bias 0.
_base_ = './faster-rcnn_r18_biased-sampling_glyph-lvis-mini.py'

model = dict(
    roi_head=dict(type='mmdet_lt.ChunkedRoIHead'),
    train_cfg=dict(
        rpn=dict(sampler=dict(_delete_=True, type='PseudoSampler')),
        rcnn=dict(sampler=dict(_delete_=True, type='mmdet_lt.AllSampler')),
    ),
)
