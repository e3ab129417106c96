"""The lab: experiments with executable claims, runs that survive a kill, reports, and the ``poise`` command line.

Methods never import this package; experiments do.
"""

from poise.core.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
