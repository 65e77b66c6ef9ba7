"""Training: the step, the `Trainer` that knows no folder, and the `Run` that adds one."""
