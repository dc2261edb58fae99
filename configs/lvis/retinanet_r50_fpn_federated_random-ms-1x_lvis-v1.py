# RetinaNet with the federated loss; every pyramid level draws its own set of classes.
_base_ = './retinanet_r50_fpn_bce_random-ms-1x_lvis-v1.py'

model = dict(
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
