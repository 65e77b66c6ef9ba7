"""Hutch++ and XTrace against slow versions written word by word from their papers."""

from __future__ import annotations

import pytest
import torch

from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.hutchpp import hutchpp
from hesstrace_cli.curvature.objective import Objective, trainable
from hesstrace_cli.curvature.operator import CurvatureMatrix
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.xtrace import xtrace
from tests.curvature import oracles
from tests.curvature.zoo import make

SIZES = [7, 20, 13]
LIKE = torch.zeros((), dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def indefinite(seed=0, decay=1.0):
    """A symmetric matrix with eigenvalues of both signs that fall off."""
    g, P = generator(seed), sum(SIZES)
    Q = torch.linalg.qr(torch.randn(P, P, generator=g, dtype=torch.float64)).Q
    eigenvalues = torch.arange(1, P + 1, dtype=torch.float64) ** -decay
    eigenvalues[::5] *= -0.3
    return Q * eigenvalues @ Q.mT


def literal_hutchpp(A, m, g):
    P, k = len(A), m // 3
    S = rademacher(torch.empty(P, k, dtype=A.dtype), generator=g)
    G = rademacher(torch.empty(P, k, dtype=A.dtype), generator=g)
    Q = torch.linalg.qr(A @ S).Q
    complement = torch.eye(P, dtype=A.dtype) - Q @ Q.T
    return (Q.T @ A @ Q).trace() + (G.T @ complement @ A @ complement @ G).trace() / k


def literal_xtrace(A, m, g):
    W = rademacher(torch.empty(len(A), m // 2, dtype=A.dtype), generator=g)
    estimates = []
    for i in range(m // 2):
        others = torch.cat([W[:, :i], W[:, i + 1 :]], 1)
        Q = torch.linalg.qr(A @ others).Q
        w = W[:, i] - Q @ (Q.T @ W[:, i])
        estimates.append((Q.T @ A @ Q).trace() + w @ A @ w)
    return torch.stack(estimates)


@pytest.mark.parametrize("m", [3, 12, 33])
def test_hutchpp_is_the_paper(m):
    A = indefinite()
    samples = hutchpp(A, LIKE, SIZES, num_products=m, generator=generator(1))
    assert samples.shape == (m // 3, 3)
    torch.testing.assert_close(samples.sum(1).mean(), literal_hutchpp(A, m, generator(1)))


@pytest.mark.parametrize("m", [4, 12, 33])
def test_xtrace_is_the_paper(m):
    A = indefinite()
    estimates = xtrace(A, LIKE, SIZES, num_products=m, generator=generator(1))
    torch.testing.assert_close(estimates.sum(1), literal_xtrace(A, m, generator(1)))


@pytest.mark.parametrize("method", [hutchpp, xtrace])
def test_blocks_are_unbiased(method):
    A = indefinite(decay=0.5)
    truth = torch.stack([block.sum() for block in A.diagonal().split(SIZES)])
    means = torch.stack([
        method(A, LIKE, SIZES, num_products=9, generator=generator(seed)).mean(0)
        for seed in range(1500)
    ])  # fmt: skip
    error = means.std(0) / len(means) ** 0.5
    assert ((means.mean(0) - truth).abs() < 4 * error).all()


@pytest.mark.parametrize("method", [hutchpp, xtrace])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_low_rank_is_exact(method, rank):
    A = torch.randn(sum(SIZES), rank, generator=generator(), dtype=torch.float64)
    A = A @ A.mT
    estimates = method(A, LIKE, SIZES, num_products=15, generator=generator(2)).sum(1)
    torch.testing.assert_close(estimates, A.trace().expand_as(estimates), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", [hutchpp, xtrace])
def test_too_few_products(method):
    with pytest.raises(ValueError, match="num_products"):
        method(indefinite(), LIKE, SIZES, num_products=2, generator=generator())


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_matrix_over_ragged_batches(curvature):
    model, X, y = make("gelu", train=False)
    objective = Objective(model, trainable(model))
    batches = [(X[:4], y[:4]), (X[4:], y[4:])]
    matrix = CurvatureMatrix(DataLoss.counted(objective, lambda: batches), curvature)
    dense = oracles.dense_hessian(objective, X, y) if curvature == "hessian" else (
        oracles.dense_ggn(objective, X))  # fmt: skip
    V = torch.randn(matrix.size, 3, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(matrix @ V, dense @ V, rtol=1e-9, atol=1e-10)
