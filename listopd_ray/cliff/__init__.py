"""The extrapolation cliff: where it lies and what follows from it."""
