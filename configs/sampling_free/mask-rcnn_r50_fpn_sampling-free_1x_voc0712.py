# Sampling-Free Mask R-CNN on masks of PASCAL VOC 2012 in COCO format, see docs/sampling_free.md.
_base_ = ['./mask-rcnn_r50_fpn_sampling-free_1x_coco.py', '../_base_/datasets/voc0712.py']

model = dict(roi_head=dict(bbox_head=dict(num_classes=20), mask_head=dict(num_classes=20)))
train_dataloader = dict(dataset=_base_.voc.masks_train)
val_dataloader = dict(dataset=_base_.voc.masks_val)
test_dataloader = dict(dataset=_base_.voc.masks_val)
val_evaluator = dict(ann_file=_base_.voc.masks_val_file)
test_evaluator = dict(ann_file=_base_.voc.masks_val_file)
