"""XTrace: Hutch++ with every probe used both to sketch and to estimate what is left."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from hesstrace_cli.curvature.matrix import Matrix, block_products
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.statistics import Mean, means


def xtrace(
    matrix: Matrix, like: Tensor, sizes: list[int], *, num_products: int, generator: Generator
) -> list[Mean]:
    """Estimate the trace of a symmetric matrix and those of its diagonal blocks.

    The estimates t_i of `left_out` are exchangeable, not independent: each w_i is also part of
    the sketches of the others, and their common correlation is positive. With s^2 their variance,
    C the covariance of any two of them and k their number, the variance of their mean is

        E[s^2] / k + C,   C = E[d_ij d_ji],   d_ij = t_i - t_i|j,

    t_i|j being t_i with w_j left out of its sketch too. To see it, let all but w_i and w_j be
    given. t_i = f(w_i; w_j) has mean tr(A) over w_i for every w_j, so that it is tr(A) + g(w_i) +
    h(w_i, w_j) with h of mean zero over either; t_i|j depends on w_i alone, and all products but
    E[h(w_i, w_j) h(w_j, w_i)] vanish in both C and E[d_ij d_ji]. Of the estimate of C, which may
    come out negative, the size is taken.

    Args:
        matrix: A, P x P.
        like: A tensor of A's dtype and device.
        sizes: The T blocks' sizes, P together.
        num_products: m >= 4; m/2 columns W of independent signs, at most P of them.
        generator: Source of all randomness.

    Returns:
        T + 1 means: the trace and those of the blocks.

    Source:
        Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace
        estimation", 2024, whose own error estimate is s / sqrt(k).
    """
    t, d = left_out(matrix, like, sizes, num_products=num_products, generator=generator)
    k = len(t)
    covariances = (d * d.transpose(0, 1)).sum((0, 1)) / (k * (k - 1))
    return [
        Mean(each.value, math.sqrt((each.stderr or 0.0) ** 2 + abs(covariance)), each.degrees)
        for each, covariance in zip(means(t), covariances.tolist(), strict=True)
    ]


def left_out(
    matrix: Matrix, like: Tensor, sizes: list[int], *, num_products: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Exchangeable estimates, and what leaving another column out changes in them.

        t_i = tr(Q_i^T A Q_i) + w_i^T (I - Q_i Q_i^T) A (I - Q_i Q_i^T) w_i

    with Q_i = orth(A W) with column i of W left out, for all i from one Q = orth(A W) and A Q:
    Q_i Q_i^T = Q (I - s_i s_i^T) Q^T, where q s_i in the range of Q is orthogonal to the other
    columns of A W. Without column j too, I - s_i s_i^T - r_ij r_ij^T takes its place, r_ij being
    s_j made orthogonal to s_i. Beside Q and A Q only k x k matrices are worked with.

    The arguments are those of `xtrace`.

    Returns:
        t, shape (k, T + 1), of the whole trace first and then of the blocks; and d with
        d[i, j] = t_i - t_i|j, shape (k, k, T + 1), zero for i = j.
    """
    k = min(num_products // 2, sum(sizes))
    if k < 2:
        raise ValueError(f"num_products is {num_products}, expected at least 4")
    W = rademacher(like.new_empty(sum(sizes), k), generator=generator)
    # In float64: in float32 the sums over P entries would leave Q far from orthonormal.
    Y = (matrix @ W).double()
    W = W.double()
    Q, R = torch.linalg.qr(Y)
    Z = (matrix @ Q.to(like.dtype)).double()
    S = torch.stack([_left_out(R, i) for i in range(k)], 1)
    QAQ, WAQ, QAW = (_block_grams(A, B, sizes) for A, B in ((Q, Z), (W, Z), (Q, Y)))
    WAW = block_products(W, Y, sizes)
    WAW = torch.cat([WAW.sum(0, keepdim=True), WAW])
    C = Q.mT @ W
    SC = S.mT @ C
    K = C - S * SC.diagonal()  # column i: (I - s_i s_i^T) Q^T w_i
    SAS = S.mT @ QAQ @ S
    own = SAS.diagonal(dim1=1, dim2=2)
    linear = WAQ.mT + QAW
    t = QAQ.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) - own + WAW
    t = t - (K * linear).sum(1) + (K * (QAQ @ K)).sum(1)
    # Row i, column j from here on: of r_ij = (s_j - cos s_i) / sin.
    cos = S.mT @ S
    sin2 = (1 - cos.square()).clamp(min=0)
    apart = (sin2 > 1e-12).to(sin2)  # else A has no rank left for w_j, and leaving it out no effect
    inverse = apart / sin2.clamp(min=1e-12)
    rAr = (own[:, None, :] - cos * (SAS + SAS.mT) + cos.square() * own[:, :, None]) * inverse
    slope = (linear - (QAQ + QAQ.mT) @ K).mT @ S
    beta = (SC.mT - cos * SC.diagonal()[:, None]) * inverse.sqrt()
    rx = (slope - cos * slope.diagonal(dim1=1, dim2=2)[:, :, None]) * inverse.sqrt()
    d = (1 - beta.square()) * rAr - beta * rx
    return t.mT, d.permute(1, 2, 0)


def _block_grams(A: Tensor, B: Tensor, sizes: list[int]) -> Tensor:
    """A^T B and its parts A_t^T B_t over the rows of each block, shape (T + 1, k, k)."""
    parts = zip(A.split(sizes), B.split(sizes), strict=True)
    grams = torch.stack([a.mT @ b for a, b in parts])
    return torch.cat([grams.sum(0, keepdim=True), grams])


def _left_out(R: Tensor, i: int) -> Tensor:
    """The unit vector orthogonal to all columns of R but the i-th."""
    others = torch.cat([R[:, :i], R[:, i + 1 :]], 1)
    return torch.linalg.qr(others, mode="complete").Q[:, -1]
