"""Vision: pruning, super-resolution, X-ray, tuning, self-supervision."""

from poise.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
