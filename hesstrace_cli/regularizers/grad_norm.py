"""The gradient-norm penalty, by exact double differentiation.

    loss + lambda ||grad L(w)||_2

Source:
    Zhao, Zhang, Hu, "Penalizing gradient norm for efficiently improving generalization in deep
    learning", ICML 2022.
"""

from __future__ import annotations

import torch

from hesstrace_cli.autodiff.graph import check_graph, gradient
from hesstrace_cli.curvature.blame import naming_fault
from hesstrace_cli.regularizers.base import Regularizer, Step, Term


class GradientNorm(Regularizer):
    """Penalizes the norm of the batch's gradient."""

    name = "grad-norm"
    default = 0.01
    unit = "weight of ||grad L||"
    is_penalty = True

    order = 2
    in_parts = False

    def term(self, step: Step) -> Term:
        """The norm over all trainable parameters."""
        with naming_fault(step.objective, step.X):
            grad = gradient(step.loss, step.objective.params, create_graph=True)
            check_graph(*grad.values())
        norms = torch.stack([torch.linalg.vector_norm(g) for g in grad.values()])
        return Term(self.strength, torch.linalg.vector_norm(norms))
