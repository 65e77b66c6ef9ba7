"""H or G of the mean loss over a whole data set, as a matrix that multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from hesstrace_cli.curvature.ggn import ggn_vp
from hesstrace_cli.curvature.graph import check_graph, gradient
from hesstrace_cli.curvature.hessian import hvp
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import Params
from hesstrace_cli.curvature.refusal import refuse
from hesstrace_cli.parallel import ALONE, Ranks

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]


def ggn_product(objective: Objective, X: Tensor, probe: Params) -> dict[str, Tensor]:
    """G v of a batch, by name.

    Raises:
        DerivativeError: If the model has not the derivatives for it.
    """
    try:
        return ggn_vp(lambda p: objective.logits(p, X), objective.params, probe)
    except RuntimeError as problem:
        raise refuse(problem, objective, X) from problem


class Matrix(Protocol):
    """A symmetric P x P matrix of which only products are taken."""

    def __matmul__(self, V: Tensor) -> Tensor:
        """The product with the columns of V, shape (P, m)."""


class CurvatureMatrix:
    """The P x P matrix H or G over N examples, in the model's own mode.

    Args:
        objective: The mean loss of a batch.
        batches: Gives the same batches on every call.
        num_examples: N, the examples in all batches together.
        curvature: "hessian" or "ggn".
        ranks: Processes over which the batches are shared: each multiplies with its own, and all
            get the sum.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Batches,
        num_examples: int,
        curvature: str,
        ranks: Ranks = ALONE,
    ) -> None:
        self.objective = objective
        self.batches = batches
        self.num_examples = num_examples
        self.curvature = curvature
        self.ranks = ranks
        self.sizes = [p.numel() for p in objective.params.values()]

    @property
    def size(self) -> int:
        """P."""
        return sum(self.sizes)

    def __matmul__(self, V: Tensor) -> Tensor:
        """The product with the columns of V, shape (P, m), in one pass over the data."""
        params = self.objective.params
        total = torch.zeros_like(V)
        for X, y in self.batches():
            multiply = self._ggn(X) if self.curvature == "ggn" else self._hessian(X, y)
            for column in range(V.shape[1]):
                parts = V[:, column].split(self.sizes)
                probe = {n: part.view_as(params[n]) for n, part in zip(params, parts, strict=True)}
                product = torch.cat([part.flatten() for part in multiply(probe).values()])
                total[:, column] += product.detach() * (len(X) / self.num_examples)
        self.ranks.sum_([total])
        return total

    def _ggn(self, X: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        return lambda v: ggn_product(self.objective, X, v)

    def _hessian(self, X: Tensor, y: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        params = self.objective.params
        try:
            grad = gradient(self.objective.loss(params, X, y), params, create_graph=True)
            check_graph(*grad.values())
        except (RuntimeError, NotImplementedError) as problem:
            raise refuse(problem, self.objective, X) from problem
        return lambda v: hvp(grad, params, v)


def block_products(A: Tensor, B: Tensor, sizes: list[int]) -> Tensor:
    """sum_j a_j b_j over the rows of each block, shape (T, m), for A and B of shape (P, m)."""
    parts = zip(A.split(sizes), B.split(sizes), strict=True)
    return torch.stack([(a * b).sum(0, dtype=torch.float64) for a, b in parts])
