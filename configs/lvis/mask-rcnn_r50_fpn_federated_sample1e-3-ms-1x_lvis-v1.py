# Federated loss with repeat-factor sampling, as in the paper (there in CenterNet2).
_base_ = './mask-rcnn_r50_fpn_ce_sample1e-3-ms-1x_lvis-v1.py'

model = dict(
    roi_head=dict(
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True,
                type='mmdet_lt.FederatedLoss',
                use_sigmoid=True,
                num_sample_classes=50,
                power=0.5,
            )
        )
    )
)
