"""Lanczos' method with full reorthogonalization: extreme eigenvalues with their residuals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hesstrace_cli.curvature.matrix import Matrix
from hesstrace_cli.errors import NumericsError


def inner_products(V: Tensor, w: Tensor) -> Tensor:
    """The inner products of the rows of V, shape (m, P), with w, shape (P,), in float64.

    PyTorch's float32 kernels sum so naively on CPUs that over ten million entries, as many as a
    network has weights, the norm of a vector comes out wrong in the fourth digit.
    """
    chunks = zip(V.split(1 << 18, 1), w.split(1 << 18), strict=True)
    return torch.stack([a.double() @ b.double() for a, b in chunks]).sum(0)


def norm(v: Tensor) -> Tensor:
    """||v||_2, summed in float64; 0-dim."""
    return inner_products(v[None], v)[0].sqrt()


_UNWAITED = 8
"""Products between two looks at the results, for each of which a GPU has to be waited for."""


class Krylov:
    """The Krylov space of a symmetric matrix A and a start vector, grown a product at a time.

        A V = V T + beta_m v_{m+1} e_m^T,   V^T V = I,   T tridiagonal

    Args:
        matrix: A, P x P.
        start: v_1, shape (P,), any length but 0.

    Attributes:
        alphas: The m entries of T's diagonal.
        betas: beta_1 to beta_m, the entries beside it.
        closed: Whether the space is invariant, so that T's eigenvalues are A's.
    """

    def __init__(self, matrix: Matrix, start: Tensor) -> None:
        self.matrix = matrix
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.closed = False
        self._rows = start.new_empty((16, len(start)))
        self._rows[0] = start / norm(start)
        self._count = 1

    @property
    def basis(self) -> Tensor:
        """v_1, v_2, ... as rows, shape (m + 1, P), or (m, P) where closed."""
        return self._rows[: self._count]

    def extend(self, steps: int) -> None:
        """Take so many products more; fewer where the space turns out to be invariant."""
        steps = min(steps, self._rows.shape[1] - len(self.alphas))
        while steps > 0 and not self.closed:
            self._look(torch.stack([self._product() for _ in range(min(steps, _UNWAITED))]))
            steps -= _UNWAITED

    def _product(self) -> Tensor:
        """Take one more; the next alpha and beta."""
        V = self.basis
        w = (self.matrix @ V[-1][:, None])[:, 0]
        alpha = inner_products(V[-1:], w)[0]
        for _ in range(2):  # twice is enough
            w = w - inner_products(V, w).to(w) @ V
        beta = norm(w)
        self._append(w / beta)
        return torch.stack([alpha, beta])

    def _look(self, pairs: Tensor) -> None:
        """Note alphas and betas, up to the one at which the space is invariant."""
        length = self._rows.shape[1]
        for alpha, beta in pairs.tolist():
            self.alphas.append(alpha)
            self.betas.append(beta)
            size = max(*map(abs, self.alphas), *self.betas[:-1], 1e-300)
            tiny = size * length**0.5 * torch.finfo(self._rows.dtype).eps
            if beta <= tiny or len(self.alphas) == length:
                self.betas[-1] = 0.0
                self.closed = True
                self._count = len(self.alphas)  # what came after is of no space
                return

    def _append(self, v: Tensor) -> None:
        if self._count == len(self._rows):
            self._rows = torch.cat([self._rows, torch.empty_like(self._rows)])
        self._rows[self._count] = v
        self._count += 1

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (ascending), the bounds beta_m |s_mi| of their residuals, and weights.

        Returns:
            Three tensors of shape (m,), float64. An eigenvalue of A lies within its residual of
            each Ritz value; the weights, squares of the eigenvectors' first entries, sum to 1.

        Raises:
            NumericsError: If a product was not finite.
        """
        if not all(map(math.isfinite, (*self.alphas, *self.betas))):
            raise NumericsError("a product with the Hessian is infinite or not a number")
        T = torch.diag(torch.tensor(self.alphas, dtype=torch.float64))
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        T += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(T)
        rounding = torch.finfo(self._rows.dtype).eps * values.abs().max()
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
    krylov: Krylov, *, k: int, rtol: float = 1e-3, max_products: int = 200
) -> Extremes:
    """The k largest eigenvalues and the smallest of a symmetric matrix.

    A repeated eigenvalue is found once: one start vector cannot see its other copies.

    Args:
        krylov: The space of the matrix and a random start vector; it is grown as needed.
        k: At most P.
        rtol: All residuals are at most this times the largest absolute eigenvalue, or
            `max_products` has come before.
        max_products: At most so many products; the space takes as many vectors of memory.
    """
    k = min(k, krylov.basis.shape[1])
    krylov.extend(min(max_products, 2 * k + 4) - len(krylov.alphas))
    while True:
        values, residuals, _ = krylov.ritz()
        ends = torch.cat([residuals[-k:], residuals[:1]])
        close = bool((ends <= rtol * values.abs().max()).all()) and len(values) >= k
        if close or krylov.closed or len(values) >= max_products:
            return Extremes(
                values[-k:].flip(0).tolist(), residuals[-k:].flip(0).tolist(),
                values[0].item(), residuals[0].item(), len(values),
            )  # fmt: skip
        krylov.extend(min(4, max_products - len(values)))
