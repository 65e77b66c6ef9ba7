"""What depends on the share of a run that is done: its learning rate, a penalty's warm-up."""

from __future__ import annotations

import math

from hesstrace_cli.config import TrainConfig


def learning_rate(config: TrainConfig, progress: float) -> float:
    """The learning rate after a share of the run, by `--schedule`."""
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "step":
        return config.lr * 0.2 ** sum(progress >= at for at in (0.3, 0.6, 0.8))
    return config.lr


def ramp(warmup: float, progress: float) -> float:
    """The share of its strength that a penalty has after a share of the run, by `--warmup`."""
    return min(1.0, progress / warmup) if warmup > 0 else 1.0
