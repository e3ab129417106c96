"""The contract every method is under: the laws, and what it takes to check them on any callable and on any device."""
