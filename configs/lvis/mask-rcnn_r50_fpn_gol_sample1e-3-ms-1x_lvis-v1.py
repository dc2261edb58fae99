# Gumbel optimised loss (GOL) with the masks of DropLoss, repeat-factor sampling, a cosine mask
# predictor and NMS at 0.3, as in the paper (which trains 24 epochs).
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.GumbelLoss',
                use_sigmoid=True,
                mask='drop',
                lambda_=0.0011,
            )
        ),
        mask_head=dict(predictor_cfg=dict(type='NormedConv2d')),
    ),
    test_cfg=dict(rcnn=dict(nms=dict(iou_threshold=0.3))),
)

train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.RepeatFactorSampler', repeat_thr=1e-3)
)
