"""Box heads of two-stage detectors."""
