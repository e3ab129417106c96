"""Can a network still learn? Measures of plasticity, and what restores or keeps it."""
