"""What a training loop needs around the model: device, seeds, precision, bounded memory, prefetch, timing.

Nothing here holds a device or a dtype of its own, and everything runs on CPU as it does on CUDA.
"""

from poise.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
