"""Experiments of poise.core, one readable file per method."""
