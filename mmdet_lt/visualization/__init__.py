"""Figures and the HTML report of finished runs."""

from mmdet_lt.visualization.report import write_report

__all__ = ['write_report']
