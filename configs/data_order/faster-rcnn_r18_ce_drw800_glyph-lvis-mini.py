# Deferred re-weighting (DRW): class-balanced weights (effective number) for the last 400 of 1,200
# iterations. Some thousand boxes in all: the paper's beta of 0.9999 would be plain inverse counts.
_base_ = '../quickstart/faster-rcnn_r18_ce_random_glyph-lvis-mini.py'

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
    dict(type='mmdet_lt.DeferredRebalancingHook', iteration=800, loss=True),
]
