"""Derivatives that are right, probes, and estimators: tensors in, records out, no I/O."""
