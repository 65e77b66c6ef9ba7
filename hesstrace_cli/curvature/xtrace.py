"""XTrace: Hutch++ with every probe used both to sketch and to estimate what is left."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hesstrace_cli.curvature.operator import Matrix, block_products
from hesstrace_cli.curvature.probes import rademacher


def xtrace(
    matrix: Matrix, like: Tensor, sizes: list[int], *, num_products: int, generator: Generator
) -> Tensor:
    """Exchangeable estimates of the traces of a symmetric matrix's diagonal blocks.

        t_i = tr(Q_i^T A Q_i) + w_i^T (I - Q_i Q_i^T) A (I - Q_i Q_i^T) w_i

    with Q_i = orth(A W) with column i of W left out, for all i from one Q = orth(A W) and A Q:
    Q_i Q_i^T = Q Q^T - q_i q_i^T, where q_i in the range of Q is orthogonal to the other columns.

    Args:
        matrix: A, P x P.
        like: A tensor of A's dtype and device.
        sizes: The T blocks' sizes, P together.
        num_products: m >= 4; m/2 columns W of independent signs, at most P of them.
        generator: Source of all randomness.

    Returns:
        Shape (m/2, T): the t_i, whose mean is the estimate; std / sqrt(m/2) is its error as the
        source gives it (the t_i are exchangeable, not independent).

    Source:
        Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
        estimation", 2024.
    """
    columns = min(num_products // 2, sum(sizes))
    if columns < 2:
        raise ValueError(f"num_products is {num_products}, expected at least 4")
    W = rademacher(like.new_empty(sum(sizes), columns), generator=generator)
    # In float64: in float32 the sums over P entries would leave Q far from orthonormal.
    Y = (matrix @ W).double()
    W = W.double()
    Q, R = torch.linalg.qr(Y)
    Z = (matrix @ Q.to(like.dtype)).double()
    S = torch.stack([_left_out(R, i) for i in range(columns)], 1)
    QS, ZS = Q @ S, Z @ S
    coefficients = Q.mT @ W
    back = (S * coefficients).sum(0)
    rest = W - Q @ coefficients + QS * back
    times_rest = Y - Z @ coefficients + ZS * back
    whole = block_products(Q, Z, sizes).sum(1, keepdim=True)
    estimates = whole - block_products(QS, ZS, sizes) + block_products(rest, times_rest, sizes)
    return estimates.mT


def _left_out(R: Tensor, i: int) -> Tensor:
    """The unit vector orthogonal to all columns of R but the i-th."""
    others = torch.cat([R[:, :i], R[:, i + 1 :]], 1)
    return torch.linalg.qr(others, mode="complete").Q[:, -1]
