"""Samplers of the boxes that a head is trained on."""
