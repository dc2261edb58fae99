# Glyph-LVIS mini: 40 classes, 2,000 + 400 images of 128 x 128. Made by
# `python tools/dataset/make_glyph_lvis.py --preset mini --out data/glyph_lvis_mini`.
data_root = 'data/glyph_lvis_mini/'
train_ann_file = 'annotations/glyph_lvis_train.json'

train_pipeline = [
    dict(type='LoadImageFromFile', imdecode_backend='cv2'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape')),
]
test_pipeline = [
    dict(type='LoadImageFromFile', imdecode_backend='cv2'),
    # Images have this size already; the step records the scale factor that heads ask for.
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='mmdet_lt.LVISDataset',
        data_root=data_root,
        ann_file=train_ann_file,
        data_prefix=dict(img=''),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='mmdet_lt.LVISDataset',
        data_root=data_root,
        ann_file='annotations/glyph_lvis_val.json',
        data_prefix=dict(img=''),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(
    type='mmdet_lt.LVISMetric',
    ann_file=data_root + 'annotations/glyph_lvis_val.json',
    metric='bbox',
)
test_evaluator = val_evaluator
