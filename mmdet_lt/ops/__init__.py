"""Loss and sampling kernels in pure torch: imports neither mmdet, mmcv nor mmengine."""
