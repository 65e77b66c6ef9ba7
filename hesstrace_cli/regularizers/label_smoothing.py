"""Label smoothing: a share epsilon of every target is spread evenly over the classes.

Source:
    Szegedy et al., "Rethinking the Inception architecture", CVPR 2016, section 7.
"""

from __future__ import annotations

from hesstrace_cli.config import TrainConfig
from hesstrace_cli.regularizers.base import Regularizer


class LabelSmoothing(Regularizer):
    """Trains on cross-entropy with the target (1 - epsilon) onehot + epsilon / C."""

    def __init__(self, strength: float, config: TrainConfig) -> None:
        super().__init__(strength, config)
        self.label_smoothing = strength
