# The same as RetinaNet is published: SGD without gradient clipping. Adam and clipping take the
# scale out of a gradient, and with it much of what focal loss and Sampling-Free are for.
_base_ = './retinanet_r18_sampling-free_glyph-lvis-mini.py'

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-4),
)
