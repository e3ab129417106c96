"""What poise.science offers. Imports no torch, so that ``poise list`` is instant."""

from poise.core.catalog import Method

METHODS: tuple[Method, ...] = ()
