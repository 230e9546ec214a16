"""Numerics shared by two methods or more."""
