"""Data samplers: the only place where the order of the training data is decided."""
