"""One readable experiment per method."""
