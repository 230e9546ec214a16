"""Attention operators: a flat shelf, one file per method, beside what they share (base.py) and how they are built."""

from attnlens.attention.base import AbstractAttention, AbstractRecurrentAttention
from attnlens.attention.build import build

__all__ = ["AbstractAttention", "AbstractRecurrentAttention", "build"]
