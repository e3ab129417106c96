"""Regularizers that act on weights alone: reparametrisations, orthogonality, spectra of layers."""
