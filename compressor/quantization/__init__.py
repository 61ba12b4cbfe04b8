"""int8: which values of a network lie on a grid of 256 steps, and how such a network is simulated in floating point."""
