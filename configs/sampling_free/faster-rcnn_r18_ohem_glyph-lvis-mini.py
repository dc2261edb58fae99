# Online hard example mining in the RoI head, biased sampling in the RPN.
_base_ = './faster-rcnn_r18_biased-sampling_glyph-lvis-mini.py'

model = dict(train_cfg=dict(rcnn=dict(sampler=dict(type='OHEMSampler'))))
