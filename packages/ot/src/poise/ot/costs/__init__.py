"""Ground costs: pairwise and elementwise form, and for ``h(x - y)`` the gradient of the conjugate of ``h``."""
