"""Experiments of poise.medical, one readable file per method."""
