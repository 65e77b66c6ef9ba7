"""Jacobian regularization.

    loss + (lambda / 2) (1/N) sum_i ||df(x_i)/dx||_F^2

The squared norm is estimated from one random unit vector v per example, E[C ||v^T J||^2] = ||J||^2.

Source:
    Hoffman, Roberts, Yaida, "Robust learning with Jacobian regularization", arXiv 1908.02729.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hesstrace_cli.regularizers.base import Regularizer, Step, Term


def jacobian_sample(logits: Tensor, X: Tensor, generator: Generator) -> Tensor:
    """An unbiased sample of (1/N) sum_i ||J_i||_F^2, J_i the logits' Jacobian in the inputs.

    Args:
        logits: Shape (N, C), with a graph to X.
        X: Inputs, shape (N, ...), needing a gradient.
        generator: Source of all randomness.

    Returns:
        0-dim, with a graph to the parameters.
    """
    v = torch.randn(
        logits.shape, dtype=logits.dtype, device=logits.device, generator=generator
    )  # fmt: skip
    v = v / v.norm(dim=1, keepdim=True)
    (product,) = torch.autograd.grad(logits, X, v, create_graph=True)
    return logits.shape[1] * product.square().sum() / len(X)


class JacobianPenalty(Regularizer):
    """Penalizes the Frobenius norm of the logits' Jacobian in the inputs."""

    order = 2
    needs_input_gradient = True

    def term(self, step: Step) -> Term:
        """Half the mean squared norm."""
        return Term(self.strength, jacobian_sample(step.logits, step.X, step.generator) / 2)
