"""Jacobian regularization.

    loss + (lambda / 2) (1/N) sum_i ||df(x_i)/dx||_F^2

The squared norm is estimated from one random unit vector v per example, E[C ||v^T J||^2] = ||J||^2.
Of inputs that are indices the derivative is that in what the model's embeddings give for them.

Source:
    Hoffman, Roberts, Yaida, "Robust learning with Jacobian regularization", arXiv 1908.02729.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from hesstrace_cli.config import TrainConfig
from hesstrace_cli.curvature.blame import naming_fault
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.regularizers.base import Regularizer, Setting, Step, Term


def jacobian_sample(outputs: Tensor, inputs: Sequence[Tensor], generator: Generator) -> Tensor:
    """An unbiased sample of (1/N) sum_i ||J_i||_F^2, J_i the outputs' Jacobian in the inputs.

    Args:
        outputs: Shape (N, ...), C numbers for each example, with a graph to the inputs.
        inputs: Each of shape (N, ...), needing a gradient; what no output depends on counts as 0.
        generator: Source of all randomness.

    Returns:
        0-dim, with a graph to the parameters.
    """
    v = torch.randn(outputs.shape, dtype=outputs.dtype, device=outputs.device, generator=generator)
    flat = v.flatten(1)
    v = (flat / flat.norm(dim=1, keepdim=True)).view_as(v)
    products = torch.autograd.grad(outputs, inputs, v, create_graph=True, materialize_grads=True)
    total = torch.stack([product.square().sum() for product in products]).sum()
    return flat.shape[1] * total / len(outputs)


class JacobianPenalty(Regularizer):
    """Penalizes the Frobenius norm of the logits' Jacobian in the inputs."""

    name = "jacobian"
    default = 0.01
    unit = "weight of ||df/dx||^2 / 2"
    is_penalty = True

    order = 2

    def __init__(self, strength: float, config: TrainConfig) -> None:
        super().__init__(strength, config)
        self._embedded: list[Tensor] = []

    def attach(self, objective: Objective) -> Objective:
        """Watch what the embeddings give in training mode, with a graph."""

        def keep(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            plain = not torch._C._functorch.is_functorch_wrapped_tensor(output)
            if module.training and torch.is_grad_enabled() and plain:
                if not output.requires_grad:  # of an embedding that is not trained
                    output.requires_grad_()
                self._embedded.append(output)

        for module in objective.model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_hook(keep)
        return objective

    def prepare(self, setting: Setting) -> None:
        """Refuse inputs that have no derivative.

        Raises:
            ConfigError: If they are indices, and no `nn.Embedding` reads them.
        """
        embeds = any(
            isinstance(module, nn.Embedding) for module in setting.objective.model.modules()
        )
        if not setting.X.is_floating_point() and not embeds:
            raise ConfigError(
                "jacobian penalizes a derivative in the inputs, and these are indices, which no "
                "torch.nn.Embedding of the model reads"
            )

    def transform(self, X: Tensor, targets: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Inputs to differentiate in."""
        self._embedded.clear()
        return (X.detach().requires_grad_() if X.is_floating_point() else X), targets

    def term(self, step: Step) -> Term:
        """Half the mean squared norm, a mean over examples."""
        inputs = [step.X]
        if not step.X.is_floating_point():  # a table of positions has no rows of examples
            inputs = [each for each in self._embedded if len(each) == len(step.outputs)]
        with naming_fault(step.objective, step.X):
            value = jacobian_sample(step.outputs, inputs, step.generator) / 2
        self._embedded.clear()
        return Term(self.strength, step.part.example_share * value, is_mean=False)
