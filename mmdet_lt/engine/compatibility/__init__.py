"""Which loss works in which detector: found by training and testing tiny models."""
