"""Assigners, samplers and target weights of the heads."""
