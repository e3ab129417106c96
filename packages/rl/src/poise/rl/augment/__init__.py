"""Augmentation of what agents see."""
