"""A model's mean loss on a batch as a function of its trainable parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hesstrace_cli.autodiff.calls import differentiable_outputs
from hesstrace_cli.autodiff.graph import Params
from hesstrace_cli.tasks import Classification, Task


@dataclass(frozen=True)
class Objective:
    """The mean loss of a batch, L(w) = (1/M) sum_m l(f_m(w), y_m), in the model's own mode.

    Attributes:
        model: Gives outputs f as the task expects them.
        params: w, the trainable parameters by name.
        task: Says how outputs and targets make the loss, and its curvature in the outputs.
    """

    model: nn.Module
    params: dict[str, Tensor]
    task: Task = Classification()

    def outputs(self, params: Params, X: Tensor) -> Tensor:
        """f(x; w) for the batch, with differentiable operations."""
        return differentiable_outputs(self.model, {**self.params, **params}, X)

    def loss(self, params: Params, X: Tensor, y: Tensor) -> Tensor:
        """L(w), a 0-dim tensor."""
        return self.task.loss(self.outputs(params, X), y)

    def residual(self, params: Params, X: Tensor, y: Tensor) -> Tensor:
        """A 0-dim tensor whose Hessian at w is R = H - G: <dl/df at w, f>, the first held fixed."""
        outputs = self.outputs(params, X)
        at = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.task.loss(at, y), at)
        # Needing a gradient, it lets a backward that cannot be differentiated again be found.
        return (slope.detach().requires_grad_() * outputs).sum()
