"""Sparse optimal transport: quadratic, entropic and cardinality-constrained plans, batched solvers, and mixture-of-experts routing."""
