# EQLv2 with box regression and masks that all classes share: two outputs of 1,203 times the width
# less. The box head also starts from the share of every class.
_base_ = './mask-rcnn_r50_fpn_eqlv2_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            type='mmdet_lt.BalancedShared2FCBBoxHead',
            reg_class_agnostic=True,
            prior_foreground=0.25,
        ),
        mask_head=dict(class_agnostic=True),
    )
)
