# Second stage with deferred re-weighting instead of pasting: class-balanced weights all along.
_base_ = './faster-rcnn_r18_stage2-cam-drs_glyph-lvis-mini.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True, type='mmdet_lt.ClassBalancedLoss', use_sigmoid=False, beta=0.99
            )
        )
    )
)
train_dataloader = dict(
    dataset=dict(pipeline={{_base_.train_pipeline}}),
    sampler=dict(_delete_=True, type='DefaultSampler', shuffle=True),
)
