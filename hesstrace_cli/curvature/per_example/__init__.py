"""Squared norms of every example's gradient, and when they may be taken."""
