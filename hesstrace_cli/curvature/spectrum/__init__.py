"""Eigenvalues, density, and what they say of training's stability."""
