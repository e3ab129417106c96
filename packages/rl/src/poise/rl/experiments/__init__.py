"""Experiments of poise.rl, one readable file per method."""
