"""Primitive penalties as pure functions.

They have no state, no device or dtype of their own, and a finite gradient wherever they are defined.

Half-precision inputs are reduced in float32 and give float32 results, which do not overflow where a float16 sum would.
"""

from poise.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
