"""The confidence penalty: a low entropy of the predicted distribution is penalized.

    loss - beta (1/N) sum_i H(p_i),   H(p) = - sum_c p_c log p_c

Source:
    Pereyra et al., "Regularizing neural networks by penalizing confident output distributions",
    arXiv 1701.06548.
"""

from __future__ import annotations

from hesstrace_cli.regularizers.base import Regularizer, Step, Term


class ConfidencePenalty(Regularizer):
    """Adds minus the mean entropy."""

    name = "confidence"
    reads_weights = None
    default = 0.1
    unit = "weight of minus the entropy"
    is_penalty = True

    def term(self, step: Step) -> Term:
        """Minus the mean entropy."""
        return Term(self.strength, -step.objective.task.entropy(step.outputs, step.targets))
