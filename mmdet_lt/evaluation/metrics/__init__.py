"""Metrics, one per file; `mmdet_lt.evaluation` imports them all."""
