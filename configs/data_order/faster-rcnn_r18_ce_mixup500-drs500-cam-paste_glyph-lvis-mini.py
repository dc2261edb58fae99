# The bag of tricks in one run: mixup for 500 of 750 iterations, then CAM-based DRS, mixup muted.
# Needs the maps of `..._drs500-cam-paste_...`. (With maps of its own first stage, by one command:
# configs/bag_of_tricks.)
_base_ = './faster-rcnn_r18_ce_drs500-cam-paste_glyph-lvis-mini.py'

custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
    dict(type='mmdet_lt.DeferredRebalancingHook', iteration=500, sampler=True),
    dict(type='mmdet_lt.MixupHook', alpha=1.5, mute_iteration=500),
]
