"""Label smoothing: a share epsilon of every target is spread evenly over the classes.

Source:
    Szegedy et al., "Rethinking the Inception architecture", CVPR 2016, section 7.
"""

from __future__ import annotations

import dataclasses

from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.regularizers.base import Regularizer


class LabelSmoothing(Regularizer):
    """Trains on cross-entropy with the target (1 - epsilon) onehot + epsilon / C."""

    name = "label-smoothing"
    reads_weights = None
    default = 0.1
    unit = "share spread over the classes"
    maximum = 1.0

    def attach(self, objective: Objective) -> Objective:
        """Smooth the targets of the loss."""
        return dataclasses.replace(objective, task=objective.task.smoothed(self.strength))
