# Second stage on LVIS v1: mixup is muted; for 6 epochs objects of classes drawn class-balanced are
# pasted by the class activation maps of the first stage.
#
# tools/dist_train_stages.sh \
#     configs/bag_of_tricks/mask-rcnn_r50_fpn_stage1-mixup_random-ms-1x_lvis-v1.py \
#     configs/bag_of_tricks/mask-rcnn_r50_fpn_stage2-cam-drs_ms-6e_lvis-v1.py 8 --work-dir DIR
#
# The schedule is not the authors' (they classify images); it is that of a short fine-tuning.
_base_ = '../lvis/mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

train_cfg = dict(max_epochs=6)
optim_wrapper = dict(optimizer=dict(lr=0.002))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=6, by_epoch=True, milestones=[4], gamma=0.1),
]
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile', backend_args=None),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='mmdet_lt.CAMPaste'),
            dict(
                type='RandomChoiceResize',
                scales=[
                    (1333, 640),
                    (1333, 672),
                    (1333, 704),
                    (1333, 736),
                    (1333, 768),
                    (1333, 800),
                ],
                keep_ratio=True,
            ),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ]
    ),
    sampler=dict(_delete_=True, type='mmdet_lt.CAMSampler', distribution='class_balanced'),
)
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
]
