"""H or G of the mean loss over a whole data set, as a matrix that multiplies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from hesstrace_cli.autodiff.graph import Params, check_graph, gradient
from hesstrace_cli.curvature.blame import naming_fault
from hesstrace_cli.curvature.data_loss import Batch, DataLoss
from hesstrace_cli.curvature.ggn import ggn_vp
from hesstrace_cli.curvature.hessian import hvp
from hesstrace_cli.curvature.objective import Objective


def ggn_product(objective: Objective, X: Tensor, y: Tensor, probe: Params) -> dict[str, Tensor]:
    """G v of a batch, by name.

    Raises:
        DerivativeError: If the model has not the derivatives for it.
    """
    with naming_fault(objective, X):
        params, task = objective.params, objective.task
        return ggn_vp(lambda p: objective.outputs(p, X), params, probe, task, y)


class Matrix(Protocol):
    """A symmetric P x P matrix of which only products are taken."""

    def __matmul__(self, V: Tensor) -> Tensor:
        """The product with the columns of V, shape (P, m)."""


class CurvatureMatrix:
    """The P x P matrix H or G of a loss over a data set, in the model's own mode.

    Args:
        data: The loss; of several processes each multiplies with its own batches, and all get
            the sum.
        curvature: "hessian" or "ggn".
    """

    def __init__(self, data: DataLoss, curvature: str) -> None:
        self.data = data
        self.objective = data.objective
        self.curvature = curvature
        self.sizes = [p.numel() for p in self.objective.params.values()]

    @property
    def size(self) -> int:
        """P."""
        return sum(self.sizes)

    def __matmul__(self, V: Tensor) -> Tensor:
        """The product with the columns of V, shape (P, m), in one pass over the data."""
        total = self.data.ranks.together(lambda: self._own_product(V))
        self.data.ranks.sum_([total])
        return total

    def _own_product(self, V: Tensor) -> Tensor:
        params = self.objective.params
        total = torch.zeros_like(V)
        for batch in self.data:
            multiply = self._ggn(batch) if self.curvature == "ggn" else self._hessian(batch)
            for column in range(V.shape[1]):
                parts = V[:, column].split(self.sizes)
                probe = {n: part.view_as(params[n]) for n, part in zip(params, parts, strict=True)}
                product = torch.cat([part.flatten() for part in multiply(probe).values()])
                total[:, column] += product.detach() * batch.share
        return total

    def _ggn(self, batch: Batch) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return lambda v: ggn_product(self.objective, batch.X, batch.y, v)

    def _hessian(self, batch: Batch) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        params = self.objective.params
        with naming_fault(self.objective, batch.X):
            loss = self.objective.loss(params, batch.X, batch.y)
            grad = gradient(loss, params, create_graph=True)
            check_graph(*grad.values())

        def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
            with naming_fault(self.objective, batch.X):
                return hvp(grad, params, v)

        return product


def block_products(A: Tensor, B: Tensor, sizes: list[int]) -> Tensor:
    """sum_j a_j b_j over the rows of each block, shape (T, m), for A and B of shape (P, m)."""
    parts = zip(A.split(sizes), B.split(sizes), strict=True)
    return torch.stack([(a * b).sum(0, dtype=torch.float64) for a, b in parts])
