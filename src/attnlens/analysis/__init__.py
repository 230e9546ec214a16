"""Analyses: pure functions from tensors to plain numbers, and the cells that the pipeline's stages write."""
