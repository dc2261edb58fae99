"""Layers of heads, such as the classifiers they build from ``cls_predictor_cfg``."""
