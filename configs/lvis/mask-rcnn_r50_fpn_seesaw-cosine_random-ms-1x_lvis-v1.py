# Seesaw loss on a cosine classifier that learns its temperature.
_base_ = './mask-rcnn_r50_fpn_seesaw_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            cls_predictor_cfg=dict(type='mmdet_lt.CosineLinear', temperature=20.0, learnable=True)
        )
    )
)
