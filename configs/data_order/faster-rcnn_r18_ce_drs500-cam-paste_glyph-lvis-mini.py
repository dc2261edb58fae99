# CAM-based DRS: as the config with annotated masks, with foregrounds by the class activation maps
# of the plain detector. First
#
# python tools/cam/extract_cams.py configs/data_order/faster-rcnn_r18_ce_random_glyph-lvis-mini.py \
#     work_dirs/data_order/uniform/seed0/iter_750.pth --method hirescam \
#     --out work_dirs/data_order/uniform.cams
_base_ = './faster-rcnn_r18_ce_drs500-mask-paste_glyph-lvis-mini.py'

train_dataloader = dict(sampler=dict(mask_source='cam', cams='work_dirs/data_order/uniform.cams'))
