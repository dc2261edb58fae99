# No heuristic and nothing in its place: cross entropy, all anchors, bias 0.
_base_ = './retinanet_r18_focal_glyph-lvis-mini.py'

model = dict(
    bbox_head=dict(
        loss_cls=dict(_delete_=True, type='CrossEntropyLoss', use_sigmoid=True),
        init_cfg=dict(type='Normal', layer='Conv2d', std=0.01),
    )
)
