"""Experiments of poise.medical, one file per method."""
