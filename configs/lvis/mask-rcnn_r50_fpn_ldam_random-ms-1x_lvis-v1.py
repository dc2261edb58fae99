# LDAM on a cosine classifier, images drawn uniformly, no class weights.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            # The loss scales the cosines, so the classifier must not.
            cls_predictor_cfg=dict(type='mmdet_lt.CosineLinear', temperature=1.0, bias=False),
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.LDAMLoss',
                use_sigmoid=False,
                max_margin=0.5,
                scale=30.0,
            ),
        )
    )
)
