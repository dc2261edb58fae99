"""Hooks; `mmdet_lt.engine` imports them all."""
