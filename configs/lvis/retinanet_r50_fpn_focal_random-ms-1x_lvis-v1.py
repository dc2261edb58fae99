# RetinaNet R50-FPN on LVIS v1, focal loss, images drawn uniformly, 8 GPUs x 2 images.
# The other RetinaNet configs of this folder change the loss of this one.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/lvis_v1_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]

custom_imports = dict(imports=['mmdet_lt'])
custom_hooks = [dict(type='mmdet_lt.ClassStatisticsHook')]

model = dict(
    bbox_head=dict(num_classes=1203),
    # LVIS allows 300 boxes an image; a threshold near 0 keeps the rare classes' low scores.
    test_cfg=dict(score_thr=1e-4, max_per_img=300),
)
optim_wrapper = dict(optimizer=dict(lr=0.01))

# Rank 0 evaluates for minutes while the others wait in a collective.
env_cfg = dict(dist_cfg=dict(backend='nccl', timeout=7200))
