# PASCAL VOC 07+12 for configs whose base is of COCO: every entry replaces that of the base. The
# settings are those of `_base_/datasets/voc0712.py` of MMDetection and of its VOC schedule.
_root = 'data/VOCdevkit/'
_classes = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow',
    'diningtable', 'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train',
    'tvmonitor',
)  # fmt: skip
_train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(1000, 600), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1000, 600), keep_ratio=True),
    # After the resizing, so that boxes of the truth keep their size.
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]


def _trainval(year):
    return dict(
        type='VOCDataset',
        data_root=_root,
        ann_file=f'VOC{year}/ImageSets/Main/trainval.txt',
        data_prefix=dict(sub_data_root=f'VOC{year}/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32, bbox_min_size=32),
        pipeline=_train_pipeline,
    )


voc = dict(
    train_dataloader=dict(
        _delete_=True,
        batch_size=2,
        num_workers=2,
        persistent_workers=True,
        sampler=dict(type='DefaultSampler', shuffle=True),
        batch_sampler=dict(type='AspectRatioBatchSampler'),
        dataset=dict(
            type='RepeatDataset',
            times=3,
            dataset=dict(
                type='ConcatDataset',
                # Each year has a `dataset_type` of its own.
                ignore_keys=['dataset_type'],
                datasets=[_trainval(2007), _trainval(2012)],
            ),
        ),
    ),
    val_dataloader=dict(
        _delete_=True,
        batch_size=1,
        num_workers=2,
        persistent_workers=True,
        drop_last=False,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(
            type='VOCDataset',
            data_root=_root,
            ann_file='VOC2007/ImageSets/Main/test.txt',
            data_prefix=dict(sub_data_root='VOC2007/'),
            test_mode=True,
            pipeline=_test_pipeline,
        ),
    ),
    evaluator=dict(_delete_=True, type='VOCMetric', metric='mAP', eval_mode='11points'),
    # Four rounds of three: twelve epochs.
    train_cfg=dict(max_epochs=4),
    param_scheduler=[
        dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
        dict(type='MultiStepLR', begin=0, end=4, by_epoch=True, milestones=[3], gamma=0.1),
    ],
    # Instance masks in COCO format; VOC's own annotation has boxes only.
    masks_train=dict(
        data_root=_root,
        ann_file='annotations/voc12_instances_train.json',
        data_prefix=dict(img='VOC2012/JPEGImages/'),
        metainfo=dict(classes=_classes),
    ),
    masks_val=dict(
        data_root=_root,
        ann_file='annotations/voc12_instances_val.json',
        data_prefix=dict(img='VOC2012/JPEGImages/'),
        metainfo=dict(classes=_classes),
    ),
    masks_val_file=_root + 'annotations/voc12_instances_val.json',
)
