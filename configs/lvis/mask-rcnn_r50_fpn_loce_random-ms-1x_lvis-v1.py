# Equilibrium loss of LOCE from the start, images drawn uniformly. The authors fine-tune a baseline
# of 24 epochs for 6 more, with memory-augmented features: see docs/losses/loce_loss.md.
_base_ = './mask-rcnn_r50_fpn_ce_random-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.LOCELoss',
                use_sigmoid=False,
                alpha=0.9,
            )
        )
    )
)
