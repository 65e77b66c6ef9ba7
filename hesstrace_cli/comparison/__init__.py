"""Runs beside each other: the grid that makes them, the table that they make."""
