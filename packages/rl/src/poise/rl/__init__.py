"""Reinforcement learning: adaptive replay ratio, BEER, PRDC, preference optimisation."""

from poise.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
