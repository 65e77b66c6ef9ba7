"""Lanczos' method with full reorthogonalization: extreme eigenvalues with their residuals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Krylov:
    """The Krylov space of a symmetric matrix A and a start vector, grown a product at a time.

        A V = V T + beta_m v_{m+1} e_m^T,   V^T V = I,   T tridiagonal

    Attributes:
        matrix: A, P x P; only products `matrix @ V` are taken.
        start: v_1, shape (P,), any length but 0.
    """

    matrix: Any
    start: Tensor
    alphas: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)
    basis: list[Tensor] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.basis.append(self.start / self.start.norm())

    def extend(self, steps: int) -> None:
        """Take so many products more; fewer where the space turns out to be invariant."""
        for _ in range(steps):
            if self.closed:
                return
            v = self.basis[-1]
            w = (self.matrix @ v[:, None])[:, 0]
            alpha = (w @ v).item()
            V = torch.stack(self.basis, 1)
            for _ in range(2):  # twice is enough
                w = w - V @ (V.mT @ w)
            beta = w.norm().item()
            self.alphas.append(alpha)
            self.betas.append(beta)
            size = max(abs(alpha), *map(abs, self.alphas), *self.betas[:-1], 1e-300)
            tiny = size * len(v) ** 0.5 * torch.finfo(v.dtype).eps
            if beta <= tiny or len(self.alphas) == len(v):
                self.betas[-1] = 0.0
                self.closed = True
                return
            self.basis.append(w / beta)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (ascending), the bounds beta_m |s_mi| of their residuals, and weights.

        Returns:
            Three tensors of shape (m,), float64. An eigenvalue of A lies within its residual of
            each Ritz value; the weights, squares of the eigenvectors' first entries, sum to 1.
        """
        T = torch.diag(torch.tensor(self.alphas, dtype=torch.float64))
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        T += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(T)
        rounding = torch.finfo(self.start.dtype).eps * values.abs().max()
        residuals = (self.betas[-1] * vectors[-1].abs()).clamp(min=rounding.item())
        return values, residuals, vectors[0].square()


@dataclass(frozen=True)
class Extremes:
    """Extreme eigenvalues.

    Attributes:
        largest: The k largest, descending.
        residuals: For each, the distance within which an eigenvalue lies.
        smallest: The smallest.
        smallest_residual: Its distance.
        products: Products with the matrix.
    """

    largest: list[float]
    residuals: list[float]
    smallest: float
    smallest_residual: float
    products: int


def extreme_eigenvalues(
    matrix: Any, start: Tensor, *, k: int, rtol: float = 1e-3, max_products: int = 200
) -> Extremes:
    """The k largest eigenvalues and the smallest of a symmetric matrix.

    Args:
        matrix: A, P x P; only products `matrix @ V` are taken.
        start: Random, shape (P,).
        k: At most P.
        rtol: All residuals are at most this times the largest absolute eigenvalue, or
            `max_products` has come before.
        max_products: At most so many products; the space takes as many vectors of memory.
    """
    k = min(k, len(start))
    krylov = Krylov(matrix, start)
    krylov.extend(min(max_products, 2 * k + 4))
    while True:
        values, residuals, _ = krylov.ritz()
        ends = torch.cat([residuals[-k:], residuals[:1]])
        close = bool((ends <= rtol * values.abs().max()).all()) and len(values) >= k
        if close or krylov.closed or len(values) >= max_products:
            return Extremes(
                values[-k:].flip(0).tolist(), residuals[-k:].flip(0).tolist(),
                values[0].item(), residuals[0].item(), len(values),
            )  # fmt: skip
        krylov.extend(min(8, max_products - len(values)))
