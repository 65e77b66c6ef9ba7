"""Estimators of traces, one file each."""
