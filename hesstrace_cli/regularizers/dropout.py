"""Dropout of the features that the last linear layer reads.

Source:
    Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
    JMLR 2014.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import ModelError
from hesstrace_cli.regularizers.base import Regularizer


class Dropout(Regularizer):
    """Drops each feature with probability `strength`, in training mode only."""

    name = "dropout"
    reads_weights = None
    default = 0.2
    unit = "drop probability"
    maximum = 0.95

    def attach(self, objective: Objective) -> Objective:
        """Put it in front of the model's last linear layer.

        Raises:
            ModelError: If the model has no `torch.nn.Linear`.
        """
        model = objective.model
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ModelError("dropout stands before the last torch.nn.Linear; the model has none")

        def drop(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            features = F.dropout(inputs[0], self.strength, training=model.training)
            return (features, *inputs[1:])

        linear[-1].register_forward_pre_hook(drop)
        return objective
