# The same with SGD. Adam divides out the scale of a loss, and with it much of what sampling
# heuristics and Sampling-Free are for.
_base_ = './retinanet_r18_none_glyph-lvis-mini.py'

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-4),
    clip_grad=dict(max_norm=10.0),
)
