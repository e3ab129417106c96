"""StableMax, perpGrad and the diagnostics of softmax collapse (Prieto, Barsbey, Mediano and Birdal, ICLR 2025)."""
