"""Trained model to trained model: fewer numbers in the cache or in the weights, and what stays exact."""
