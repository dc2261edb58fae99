# EQLv2 with repeat-factor sampling. On a schedule this short a sigmoid classifier needs a larger
# step than the rest of the network and no prior bias: it would take most of the schedule to unlearn
# one of -6.9.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True, type='mmdet_lt.EQLv2Loss', use_sigmoid=True, prior_prob=None
            )
        )
    )
)
train_dataloader = dict(
    sampler=dict(_delete_=True, type='mmdet_lt.RepeatFactorSampler', repeat_thr=0.1)
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'fc_cls': dict(lr_mult=5.0)}))
