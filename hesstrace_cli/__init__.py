"""Train with, estimate and compare the trace of the loss Hessian."""

__version__ = "0.1.0"
