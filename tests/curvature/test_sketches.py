"""Hutch++ and XTrace against slow versions written word by word from their papers."""

from __future__ import annotations

import pytest
import torch

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.trace.hutchpp import hutchpp
from hesstrace_cli.curvature.trace.xtrace import left_out, xtrace
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
    """The t_i, and t_i - t_i|j, for each block and, first, the whole."""
    k = m // 2
    W = rademacher(torch.empty(len(A), k, dtype=A.dtype), generator=g)

    def estimate(i, *dropped):
        Q = torch.linalg.qr(A @ W[:, [c for c in range(k) if c not in dropped]]).Q
        w = W[:, i] - Q @ (Q.T @ W[:, i])
        diagonal = (Q * (A @ Q)).sum(1) + w * (A @ w)
        return torch.stack([diagonal.sum(), *(part.sum() for part in diagonal.split(SIZES))])

    t = torch.stack([estimate(i, i) for i in range(k)])
    d = torch.stack([torch.stack([t[i] - estimate(i, i, j) for j in range(k)]) for i in range(k)])
    return t, d


@pytest.mark.parametrize("m", [3, 12, 33])
def test_hutchpp_is_the_paper(m):
    A = indefinite()
    total, *parts = hutchpp(A, LIKE, SIZES, num_products=m, generator=generator(1))
    assert total.value == pytest.approx(literal_hutchpp(A, m, generator(1)).item())
    assert total.value == pytest.approx(sum(part.value for part in parts))


@pytest.mark.parametrize("m", [4, 12, 33])
def test_xtrace_is_the_paper(m):
    A = indefinite()
    t, d = left_out(A, LIKE, SIZES, num_products=m, generator=generator(1))
    literal = literal_xtrace(A, m, generator(1))
    torch.testing.assert_close((t, d), literal, rtol=1e-10, atol=1e-12)
    found = xtrace(A, LIKE, SIZES, num_products=m, generator=generator(1))
    assert [mean.value for mean in found] == pytest.approx(literal[0].mean(0).tolist())


def test_xtraces_error_is_that_of_repetitions():
    """The mean of its variances over many draws is the variance of its values."""
    A = indefinite(decay=1.0)
    draws = [xtrace(A, LIKE, SIZES, num_products=12, generator=generator(s)) for s in range(1500)]
    values = torch.tensor([[mean.value for mean in draw] for draw in draws])
    variances = torch.tensor([[mean.stderr**2 for mean in draw] for draw in draws])
    assert ((variances.mean(0) / values.var(0) - 1).abs() < 0.25).all()


@pytest.mark.parametrize("method", [hutchpp, xtrace])
def test_blocks_are_unbiased(method):
    A = indefinite(decay=0.5)
    truth = torch.stack([block.sum() for block in A.diagonal().split(SIZES)])
    draws = [method(A, LIKE, SIZES, num_products=9, generator=generator(s)) for s in range(1500)]
    means = torch.tensor([[mean.value for mean in draw[1:]] for draw in draws]).double()
    error = means.std(0) / len(means) ** 0.5
    assert ((means.mean(0) - truth).abs() < 4 * error).all()


@pytest.mark.parametrize("method", [hutchpp, xtrace])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_low_rank_is_exact(method, rank):
    A = torch.randn(sum(SIZES), rank, generator=generator(), dtype=torch.float64)
    A = A @ A.mT
    total, *_ = method(A, LIKE, SIZES, num_products=15, generator=generator(2))
    assert total.value == pytest.approx(A.trace().item(), rel=1e-9, abs=1e-9)
    assert total.stderr < 1e-9


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
