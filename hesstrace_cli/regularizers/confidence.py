"""The confidence penalty: a low entropy of the predicted distribution is penalized.

    loss - beta (1/N) sum_i H(p_i),   H(p) = - sum_c p_c log p_c

Source:
    Pereyra et al., "Regularizing neural networks by penalizing confident output distributions",
    arXiv 1701.06548.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hesstrace_cli.regularizers.base import Regularizer, Step, Term


def mean_entropy(logits: Tensor) -> Tensor:
    """(1/N) sum_i H(p_i) in nats, 0-dim, of logits (N, C)."""
    return torch.special.entr(F.softmax(logits, dim=1)).sum(1).mean()


class ConfidencePenalty(Regularizer):
    """Adds minus the mean entropy."""

    def term(self, step: Step) -> Term:
        """Minus the mean entropy."""
        return Term(self.strength, -mean_entropy(step.logits))
