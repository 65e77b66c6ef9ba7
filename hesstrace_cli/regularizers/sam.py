"""Sharpness-aware minimization: the gradient is taken at the worst point nearby.

    min_w L(w + e),   e = rho grad L(w) / ||grad L(w)||_2, held constant

Source:
    Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-aware minimization for efficiently improving
    generalization", ICLR 2021.
"""

from __future__ import annotations

import torch

from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.regularizers.base import Regularizer, Step, Term


class SharpnessAware(Regularizer):
    """Trains on the loss at distance `strength` up the gradient, in place of the plain loss."""

    name = "sam"
    default = 0.05
    unit = "radius rho"

    in_parts = False

    def term(self, step: Step) -> Term:
        """L(w + e)."""
        grad = gradient(step.loss, step.objective.params)
        norm = torch.nn.utils.get_total_norm(list(grad.values()))
        scale = self.strength / (norm + torch.finfo(norm.dtype).tiny)
        return Term(1.0, step.loss_at({n: scale * g for n, g in grad.items()}), replaces=True)
