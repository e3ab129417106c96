"""Transitions on which agents learn."""
