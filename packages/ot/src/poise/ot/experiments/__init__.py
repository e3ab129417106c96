"""Experiments of poise.ot, one readable file per method."""
