"""Derivatives held against differences of the model itself."""
