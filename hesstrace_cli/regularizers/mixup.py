"""Mixup: the batch is mixed with itself in another order, inputs and targets alike.

    x = m x_i + (1 - m) x_j,   y = m y_i + (1 - m) y_j,   m ~ Beta(alpha, alpha), one a batch

Source:
    Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: beyond empirical risk minimization", ICLR 2018.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hesstrace_cli.regularizers.base import Regularizer


class Mixup(Regularizer):
    """Mixes with a weight drawn from Beta(strength, strength)."""

    def transform(self, X: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Mix; class numbers become probabilities."""
        if not targets.is_floating_point():
            assert self.config.num_classes is not None
            targets = F.one_hot(targets, self.config.num_classes).to(X.dtype)
        seed = torch.randint(1 << 62, (), generator=generator, device=X.device).item()
        share = float(np.random.default_rng(int(seed)).beta(self.strength, self.strength))
        order = torch.randperm(len(X), generator=generator, device=X.device)
        return share * X + (1 - share) * X[order], share * targets + (1 - share) * targets[order]
