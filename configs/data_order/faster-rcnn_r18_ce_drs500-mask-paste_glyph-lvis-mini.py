# DRS that pastes annotated foregrounds ("ImageTrans", the ablation of CAM-based sampling): plain
# for 500 of 750 iterations, then half of the images get an object of a class drawn class-balanced.
# Glyphs depend on their orientation, so they are not mirrored and hardly turned.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile', imdecode_backend='cv2'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='mmdet_lt.CAMPaste', flip_prob=0.0, rotation=15.0),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape')),
        ]
    ),
    sampler=dict(
        _delete_=True, type='mmdet_lt.CAMSampler', distribution='class_balanced', mask_source='mask'
    ),
)
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
    dict(type='mmdet_lt.DeferredRebalancingHook', iteration=500, sampler=True),
]
