"""Averages of the weights: the network that is judged is a mean of those passed on the way.

    swa:  w_bar = mean of w after each of the last epochs
    ema:  w_bar <- d w_bar + (1 - d) w after every step, from the first step's w on

Training itself goes on as without them. The average has activations of its own, so that BatchNorm's
statistics are taken anew, over the training data, before it is evaluated.

Source:
    Izmailov, Podoprikhin, Garipov, Vetrov, Wilson, "Averaging weights leads to wider optima and
    better generalization", UAI 2018; Polyak, Juditsky, "Acceleration of stochastic approximation
    by averaging", SIAM J. Control Optim. 1992.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from hesstrace_cli.regularizers.base import Regularizer


class WeightAverage(Regularizer):
    """Which weights the average is of, and how the next one is added to it."""

    reads_weights = "it keeps an average of the whole weights"

    def num_averaged(self, steps: int, *, steps_per_epoch: int, total_steps: int) -> int:
        """How many weights the average is of after so many steps of a run; 0 before it begins."""
        raise NotImplementedError

    def rule(self) -> Callable[..., Any]:
        """`multi_avg_fn` of `torch.optim.swa_utils.AveragedModel`."""
        raise NotImplementedError


class StochasticWeightAverage(WeightAverage):
    """Averages the weights after each epoch of the run's last part, of share `strength`."""

    name = "swa"
    default = 0.25
    unit = "share of the run, its last part, whose epochs are averaged"
    maximum = 1.0
    alone_to = "average the weights"
    acts_late = True

    def num_averaged(self, steps: int, *, steps_per_epoch: int, total_steps: int) -> int:
        """Of the last epochs, at least one."""
        epochs = total_steps // steps_per_epoch
        return max(0, steps // steps_per_epoch - epochs + max(1, round(self.strength * epochs)))

    def rule(self) -> Callable[..., Any]:
        """The running mean."""
        return get_swa_multi_avg_fn()


class ExponentialMovingAverage(WeightAverage):
    """Averages the weights after every step, an earlier one less by the factor `strength`."""

    name = "ema"
    default = 0.99
    unit = "decay a step"
    maximum = 0.999999
    alone_to = "average the weights"
    spacing = "decay"

    def num_averaged(self, steps: int, *, steps_per_epoch: int, total_steps: int) -> int:
        """Of all steps."""
        return steps

    def rule(self) -> Callable[..., Any]:
        """The moving mean."""
        return get_ema_multi_avg_fn(self.strength)
