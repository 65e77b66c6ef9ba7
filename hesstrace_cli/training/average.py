"""The averaged network of a run with `swa` or `ema`, beside the one that is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from hesstrace_cli.regularizers import WeightAverage


class Averaged:
    """A network whose weights are an average of the trained one's.

    Args:
        rule: What is averaged, and how.
        model: Of the trained one's architecture, bare; it becomes the averaged one.
        steps_per_epoch: Of the run.
        total_steps: Of the run.
    """

    def __init__(
        self, rule: WeightAverage, model: nn.Module, *, steps_per_epoch: int, total_steps: int
    ) -> None:
        self._rule = rule
        self._length = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        self._average = AveragedModel(model, multi_avg_fn=rule.rule())

    @property
    def network(self) -> nn.Module:
        """The averaged network."""
        module: nn.Module = self._average.module
        return module

    def count_after(self, steps: int) -> int:
        """How many weights the average is of after so many steps."""
        return self._rule.num_averaged(steps, **self._length)

    def add(self, model: nn.Module, steps: int) -> None:
        """Take the weights into the average, where those after so many steps belong to it."""
        if self.count_after(steps) > self.count_after(steps - 1):
            self._average.update_parameters(model)

    @torch.no_grad()
    def renew(self, model: nn.Module, batches: Iterable[Any]) -> None:
        """Take BatchNorm's statistics anew, over these batches; other buffers are the model's."""
        for own, trained in zip(self.network.buffers(), model.buffers(), strict=True):
            own.copy_(trained)
        update_bn(batches, self.network)

    def load(self, weights: Mapping[str, Any], count: int) -> None:
        """Go on from an average of so many."""
        self.network.load_state_dict(weights)
        self._average.n_averaged.fill_(count)
