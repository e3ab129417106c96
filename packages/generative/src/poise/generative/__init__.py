"""Generative: GANs, diffusion, representation alignment, latent structure."""

from poise.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
