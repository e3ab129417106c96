"""Small real data that PyPI packages ship: images, medical images, tables and text. Nothing is downloaded.

Everything comes as tensors (texts as strings) in a frozen dataclass that says its licence and source.
"""

from poise.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
