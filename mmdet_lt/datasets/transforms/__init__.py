"""Transforms of images and their annotations."""
