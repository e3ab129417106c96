"""Soft and noisy targets: what the label of a training example should be when the given one is not all there is to know."""
