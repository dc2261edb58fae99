# Sampling-Free ATSS on PASCAL VOC 07+12; MMDetection has no ATSS for it.
_base_ = ['./atss_r50_fpn_sampling-free_1x_coco.py', '../_base_/datasets/voc0712.py']

model = dict(bbox_head=dict(num_classes=20))
train_dataloader = _base_.voc.train_dataloader
val_dataloader = _base_.voc.val_dataloader
test_dataloader = _base_.voc.val_dataloader
val_evaluator = _base_.voc.evaluator
test_evaluator = _base_.voc.evaluator
train_cfg = _base_.voc.train_cfg
param_scheduler = _base_.voc.param_scheduler
