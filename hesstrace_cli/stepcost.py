"""The time of a training step with a regularizer, over that of a plain one."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hesstrace_cli.config import TrainConfig
from hesstrace_cli.errors import NumericsError
from hesstrace_cli.training import Run

_ROUNDS, _STEPS = 5, 4


def step_costs(configs: Mapping[str, TrainConfig]) -> dict[str, float]:
    """Ratios to `none`, every row's steps timed in turn so that a busy machine slows all alike.

    Args:
        configs: One run a row, by the row's name; without `none` there is nothing to compare to.

    Returns:
        Medians over a few rounds, by name, of steps at full strength; those of a penalty that
        is added on every k-th step are averaged over k.
    """
    if "none" not in configs:
        return {}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: Run(dataclasses.replace(config, out=str(Path(folder) / str(i)), resume=False))
            for i, (name, config) in enumerate(configs.items())
        }
        for _ in range(_ROUNDS):
            for name, run in runs.items():
                steps = max(_STEPS, run.config.every)
                try:
                    seconds[name].append(run.seconds_of_steps(steps) / steps)
                except NumericsError:  # the same batch again and again may diverge
                    continue
    medians = {name: statistics.median(own) for name, own in seconds.items() if own}
    return {name: own / medians["none"] for name, own in medians.items()}
