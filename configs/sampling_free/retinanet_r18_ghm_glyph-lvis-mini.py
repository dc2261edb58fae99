# Gradient harmonizing loss in place of the focal loss.
_base_ = './retinanet_r18_focal_glyph-lvis-mini.py'

model = dict(
    bbox_head=dict(
        loss_cls=dict(
            _delete_=True, type='mmdet_lt.GHMCLoss', use_sigmoid=True, bins=30, momentum=0.75
        )
    )
)
