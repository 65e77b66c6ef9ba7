"""Jacobian regularization.

    loss + (lambda / 2) (1/N) sum_i ||df(x_i)/dx||_F^2

The squared norm is estimated from one random unit vector v per example, E[C ||v^T J||^2] = ||J||^2.

Source:
    Hoffman, Roberts, Yaida, "Robust learning with Jacobian regularization", arXiv 1908.02729.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hesstrace_cli.curvature.blame import naming_fault
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.regularizers.base import Regularizer, Setting, Step, Term


def jacobian_sample(outputs: Tensor, X: Tensor, generator: Generator) -> Tensor:
    """An unbiased sample of (1/N) sum_i ||J_i||_F^2, J_i the outputs' Jacobian in the inputs.

    Args:
        outputs: Shape (N, ...), C numbers for each example, with a graph to X.
        X: Inputs, shape (N, ...), needing a gradient.
        generator: Source of all randomness.

    Returns:
        0-dim, with a graph to the parameters.
    """
    v = torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
    flat = v.flatten(1)
    v = (flat / flat.norm(dim=1, keepdim=True)).view_as(v)
    (product,) = torch.autograd.grad(outputs, X, v, create_graph=True, materialize_grads=True)
    return flat.shape[1] * product.square().sum() / len(X)


class JacobianPenalty(Regularizer):
    """Penalizes the Frobenius norm of the logits' Jacobian in the inputs."""

    name = "jacobian"
    default = 0.01
    unit = "weight of ||df/dx||^2 / 2"
    is_penalty = True

    order = 2

    def prepare(self, setting: Setting) -> None:
        """Refuse inputs that have no derivative.

        Raises:
            ConfigError: If they are indices.
        """
        if not setting.X.is_floating_point():
            raise ConfigError(
                "jacobian penalizes a derivative in the inputs, and these are indices"
            )

    def transform(self, X: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Inputs to differentiate in."""
        return X.detach().requires_grad_(), targets

    def term(self, step: Step) -> Term:
        """Half the mean squared norm, a mean over examples."""
        with naming_fault(step.objective, step.X):
            value = jacobian_sample(step.outputs, step.X, step.generator) / 2
        return Term(self.strength, step.part.example_share * value, is_mean=False)
