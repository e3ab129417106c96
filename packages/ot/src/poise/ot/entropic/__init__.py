"""Entropic optimal transport: the Sinkhorn solver, its streaming form for large point clouds, and the Sinkhorn divergence."""
