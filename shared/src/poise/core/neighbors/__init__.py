"""Exact nearest neighbours in bounded memory."""
