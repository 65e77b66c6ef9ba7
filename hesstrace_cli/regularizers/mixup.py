"""Mixup: the batch is mixed with itself in another order, inputs and targets alike.

    x = m x_i + (1 - m) x_j,   y = m y_i + (1 - m) y_j,   m ~ Beta(alpha, alpha), one a batch

Source:
    Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: beyond empirical risk minimization", ICLR 2018.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor

from hesstrace_cli.errors import ConfigError
from hesstrace_cli.regularizers.base import Regularizer, Setting


class Mixup(Regularizer):
    """Mixes with a weight drawn from Beta(strength, strength)."""

    name = "mixup"
    reads_weights = None
    default = 0.2
    unit = "alpha of Beta(alpha, alpha)"

    def prepare(self, setting: Setting) -> None:
        """Learn what targets become numbers that can be mixed.

        Raises:
            ConfigError: If the inputs or the targets have no means.
        """
        if not setting.X.is_floating_point():
            raise ConfigError("mixup mixes inputs, and these are indices, which have no mean")
        self._mixable = partial(setting.objective.task.mixable, num_outputs=setting.num_outputs)
        self._mixable(setting.y)

    def transform(self, X: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Mix; class numbers become probabilities."""
        targets = self._mixable(targets).to(X.dtype)
        seed = torch.randint(1 << 62, (), generator=generator, device=X.device).item()
        share = float(np.random.default_rng(int(seed)).beta(self.strength, self.strength))
        order = torch.randperm(len(X), generator=generator, device=X.device)
        return share * X + (1 - share) * X[order], share * targets + (1 - share) * targets[order]
