"""What depends on the share of a run that is done: its learning rate, a penalty's warm-up."""

from __future__ import annotations

import math

from hesstrace_cli.config import TrainConfig

_PLATEAU = 4.0


def learning_rate(config: TrainConfig, progress: float, plateaus: int = 0) -> float:
    """The learning rate after a share of the run, by `--schedule` and `--lr-warmup`.

    Args:
        config: The run's.
        progress: The share.
        plateaus: Epochs so far that were no better on validation than all before.
    """
    lr = config.lr * ramp(config.lr_warmup, progress)
    if config.schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "step":
        return lr * 0.2 ** sum(progress >= at for at in (0.3, 0.6, 0.8))
    if config.schedule == "plateau":
        return lr / _PLATEAU**plateaus
    return lr


def ramp(warmup: float, progress: float) -> float:
    """The share that is reached after a share of the run, where it rises over the first of it."""
    return min(1.0, progress / warmup) if warmup > 0 else 1.0
