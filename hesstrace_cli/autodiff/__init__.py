"""Derivatives that are right of every order, of any model: no loss, no estimator."""
