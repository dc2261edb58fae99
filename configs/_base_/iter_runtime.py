# Log and save by iteration.
_base_ = './default_runtime.py'

default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=400, max_keep_ckpts=1),
    logger=dict(interval=25),
)
log_processor = dict(type='LogProcessor', window_size=25, by_epoch=False)
