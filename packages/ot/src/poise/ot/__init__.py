"""Optimal transport: Monge gap, sparse optimal transport, shape correspondence."""

from poise.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
