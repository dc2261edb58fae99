# Deferred re-weighting (DRW): class-balanced weights (effective number) for the last 250 of 750
# iterations. With some thousand boxes in all, beta = 0.9999 would give plain inverse counts.
_base_ = './faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True, type='mmdet_lt.ClassBalancedLoss', use_sigmoid=False, beta=0.99
            )
        )
    )
)
custom_hooks = [
    dict(type='mmdet_lt.ClassStatisticsHook'),
    dict(type='mmdet_lt.SamplerStateHook'),
    dict(type='mmdet_lt.DeferredRebalancingHook', iteration=500, loss=True),
]
