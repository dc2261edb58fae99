# Mask R-CNN R50-FPN on LVIS v1, softmax cross entropy, images drawn uniformly, 8 GPUs x 2 images.
# The other configs of this folder change the loss, the sampler or the schedule of this one.
_base_ = 'mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py'

custom_imports = dict(imports=['mmdet_lt'])
custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook')]

data_root = 'data/lvis_v1/'
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmdet_lt.LVISDataset',
        data_root=data_root,
        ann_file='annotations/lvis_v1_train.json',
        data_prefix=dict(img=''),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline={{_base_.train_pipeline}},
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmdet_lt.LVISDataset',
        data_root=data_root,
        ann_file='annotations/lvis_v1_val.json',
        data_prefix=dict(img=''),
        test_mode=True,
        pipeline={{_base_.test_pipeline}},
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type='mmdet_lt.LVISMetric',
    ann_file=data_root + 'annotations/lvis_v1_val.json',
    metric=['bbox', 'segm'],
)
test_evaluator = val_evaluator

# Rank 0 evaluates for minutes while the others wait in a collective.
env_cfg = dict(dist_cfg=dict(backend='nccl', timeout=7200))
