"""Regularizer primitives, general-purpose methods and GPU utilities shared by every poise package."""

from poise.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
