"""Transport maps learned from samples: the Monge gap, structured and conditional maps, and convex potentials."""
