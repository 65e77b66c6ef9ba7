"""Hutch++: the trace on a sketched subspace exactly, the rest by Hutchinson's method."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hesstrace_cli.curvature.matrix import Matrix, block_products
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.statistics import Mean, means


def hutchpp(
    matrix: Matrix, like: Tensor, sizes: list[int], *, num_products: int, generator: Generator
) -> list[Mean]:
    """Estimate the trace of a symmetric matrix and those of its diagonal blocks.

        tr(A) ~ tr(Q^T A Q) + (3/m) tr(G^T (I - Q Q^T) A (I - Q Q^T) G),   Q = orth(A S)

    with S and G of m/3 columns of independent signs.

    Args:
        matrix: A, P x P.
        like: A tensor of A's dtype and device.
        sizes: The T blocks' sizes, P together.
        num_products: m >= 3.
        generator: Source of all randomness.

    Returns:
        T + 1 means: the trace and those of the blocks. Every column of G gives a sample; given Q
        they are independent, so that their spread tells the error.

    Source:
        Meyer, Musco, Musco, Woodruff, "Hutch++: optimal stochastic trace estimation", 2021,
        algorithm 1.
    """
    columns = num_products // 3
    if columns < 1:
        raise ValueError(f"num_products is {num_products}, expected at least 3")
    shape = (sum(sizes), columns)
    S = rademacher(like.new_empty(shape), generator=generator)
    # In float64: in float32 the sums over P entries would leave Q far from orthonormal.
    Q = torch.linalg.qr((matrix @ S).double()).Q
    G = rademacher(like.new_empty(shape), generator=generator).double()
    G = G - Q @ (Q.mT @ G)
    products = matrix @ torch.cat([Q, G], 1).to(like.dtype)
    sketched = block_products(Q, products[:, : Q.shape[1]], sizes).sum(1)
    rest = block_products(G, products[:, Q.shape[1] :], sizes)
    samples = (sketched[:, None] + rest).mT
    return means(torch.cat([samples.sum(1, keepdim=True), samples], 1))
