"""The spectral density by stochastic Lanczos quadrature.

For a random unit vector z, the Ritz values theta_j of m Lanczos steps from z and the squared first
entries tau_j of their vectors are nodes and weights of a Gauss quadrature of the spectral measure:

    sum_j tau_j f(theta_j) ~ z^T f(A) z,   E[P z^T f(A) z] = tr f(A)

exactly for polynomials f of degree up to 2 m - 1, so for the trace and the Frobenius norm.

Source:
    Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", 2017;
    Ghorbani, Krishnan, Xiao, "An investigation into neural net optimization via Hessian
    eigenvalue density", ICML 2019.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hesstrace_cli.curvature.matrix import Matrix
from hesstrace_cli.curvature.spectrum.lanczos import Krylov
from hesstrace_cli.curvature.statistics import Mean, means


@dataclass(frozen=True)
class Share:
    """A share, and bounds of it for the vectors that were drawn, their own chance left out."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Density:
    """Nodes and weights of each probe's quadrature.

    Attributes:
        size: P.
        nodes: For each probe its Ritz values, shape (m,).
        weights: For each probe their weights, which sum to 1.
    """

    size: int
    nodes: list[Tensor]
    weights: list[Tensor]

    def moment(self, power: int) -> Mean:
        """tr(A^power), with its standard error over the probes."""
        samples = [
            self.size * (w * x**power).sum() for x, w in zip(self.nodes, self.weights, strict=True)
        ]
        return means(torch.stack(samples)[:, None])[0]

    def share_below(self, cut: float) -> Share:
        """The share of the eigenvalues below a cut, with the bounds that the quadrature sets.

        With c nodes below the cut, the measure below it lies between the first c - 1 weights and
        the first c + 1 (Chebyshev, Markov, Stieltjes): wide where many eigenvalues are near it.
        """
        shares = []
        for x, w in zip(self.nodes, self.weights, strict=True):
            sums = torch.cat([w.new_zeros(2), w.cumsum(0), w.new_ones(1)])
            count = int((x < cut).sum())
            shares.append(sums[[count + 1, count, count + 2]])
        return Share(*torch.stack(shares).mean(0).clamp(0, 1).tolist())

    def quantile(self, share: float) -> float:
        """The estimated eigenvalue below which so large a share of them lies."""
        nodes, order = torch.cat(self.nodes).sort()
        weights = torch.cat(self.weights)[order].cumsum(0) / len(self.nodes)
        return nodes[int((weights < share).sum().clamp(max=len(nodes) - 1))].item()

    def on_grid(self, points: int = 400, width: float = 0.01) -> tuple[list[float], list[float]]:
        """The density, each node a Gaussian of standard deviation `width` times the range.

        Returns:
            Eigenvalues and the share of the eigenvalues per unit of eigenvalue; of a matrix that
            is 0, a bell of standard deviation 1.
        """
        nodes, weights = torch.cat(self.nodes), torch.cat(self.weights) / len(self.nodes)
        low, high = nodes.min().item(), nodes.max().item()
        size = max(abs(low), abs(high))
        sigma = max(width * (high - low), 1e-3 * size) if size > 1e-30 else 1.0
        grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, points, dtype=torch.float64)
        bells = torch.exp(-((grid[:, None] - nodes) ** 2) / (2 * sigma**2))
        values = bells @ weights / (sigma * (2 * torch.pi) ** 0.5)
        return grid.tolist(), values.tolist()


def spectral_density(
    matrix: Matrix, starts: Iterable[Tensor], *, steps: int, first: Krylov | None = None
) -> Density:
    """Run Lanczos from random vectors.

    Args:
        matrix: A, P x P.
        starts: z with E[z z^T] = I, shape (P,) each.
        steps: m, products for each.
        first: A space grown from such a vector already; it counts as one, and is grown to m.
    """
    nodes, weights = [], []
    spaces = itertools.chain([first] if first else [], (Krylov(matrix, z) for z in starts))
    for krylov in spaces:
        krylov.extend(steps - len(krylov.alphas))
        values, _, tau = krylov.ritz()
        nodes.append(values)
        weights.append(tau)
        size = krylov.basis.shape[1]
    return Density(size, nodes, weights)
