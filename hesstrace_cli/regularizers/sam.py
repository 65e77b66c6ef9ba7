"""Sharpness-aware minimization: the gradient is taken at the worst point nearby.

    min_w L(w + e),   e = rho grad L(w) / ||grad L(w)||_2, held constant

Source:
    Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-aware minimization for efficiently improving
    generalization", ICLR 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hesstrace_cli.autodiff.graph import Params, gradient
from hesstrace_cli.regularizers.base import Regularizer, Step, Term


class SharpnessAware(Regularizer):
    """Trains on the loss at distance `strength` up the gradient, in place of the plain loss."""

    name = "sam"
    default = 0.05
    unit = "radius rho"
    alone_to = "stand in the place of the loss"

    in_parts = False

    def term(self, step: Step) -> Term:
        """L(w + e)."""
        grad = gradient(step.loss, step.objective.params)
        return Term(1.0, step.loss_at(self.ascent(grad, step.objective.params)), replaces=True)

    def ascent(self, grad: Params, params: Params) -> dict[str, Tensor]:
        """The way e to the worst point, without a graph."""
        norm = torch.nn.utils.get_total_norm(list(grad.values()))
        scale = self.strength / (norm + torch.finfo(norm.dtype).tiny)
        return {name: scale * g for name, g in grad.items()}
