# Adaptive class suppression loss, images drawn uniformly, trained as a whole. The paper trains the
# classifier alone, for 12 epochs from a trained softmax model: give that one as `load_from`.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(_delete_=True, type='mmdet_lt.ACSLLoss', use_sigmoid=True, score_thr=0.7)
        )
    )
)
