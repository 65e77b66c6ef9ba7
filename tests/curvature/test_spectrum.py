"""Lanczos, the spectral density and linear stability against matrices that are known."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.matrix import CurvatureMatrix
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import rademacher
from hesstrace_cli.curvature.spectrum.density import Density, Share, spectral_density
from hesstrace_cli.curvature.spectrum.lanczos import Krylov, extreme_eigenvalues
from hesstrace_cli.curvature.spectrum.stability import sentence, stability, threshold
from hesstrace_cli.curvature.trace.hutchpp import hutchpp
from hesstrace_cli.curvature.trace.xtrace import xtrace
from tests.curvature import oracles
from tests.curvature.test_derivatives import CASES, setup


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix_of(eigenvalues, seed=0):
    P = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(P, P, generator=generator(seed), dtype=torch.float64)).Q
    return Q * torch.as_tensor(eigenvalues, dtype=torch.float64) @ Q.mT


def outliers_and_bulk(P=300):
    bulk = torch.linspace(-0.05, 0.3, P - 4, dtype=torch.float64)
    return torch.cat([bulk, torch.tensor([2.0, 5.0, 9.0, -1.0], dtype=torch.float64)])


def start(P, seed=3):
    return torch.randn(P, generator=generator(seed), dtype=torch.float64)


def test_krylov_relation():
    A = matrix_of(outliers_and_bulk())
    krylov = Krylov(A, start(300))
    krylov.extend(40)
    V = krylov.basis.mT
    torch.testing.assert_close(V.mT @ V, torch.eye(41, dtype=V.dtype), atol=1e-12, rtol=0)
    T = V[:, :40].mT @ A @ V[:, :40]
    torch.testing.assert_close(T.diagonal(), torch.tensor(krylov.alphas, dtype=V.dtype))
    torch.testing.assert_close(T.diagonal(1), torch.tensor(krylov.betas[:-1], dtype=V.dtype))


def test_extreme_eigenvalues_lie_within_their_residuals():
    eigenvalues = outliers_and_bulk()
    found = extreme_eigenvalues(Krylov(matrix_of(eigenvalues), start(300)), k=3, rtol=1e-6)
    assert found.largest == pytest.approx([9, 5, 2], abs=1e-5)
    assert found.smallest == pytest.approx(-1, abs=1e-5)
    krylov = Krylov(matrix_of(eigenvalues), start(300))
    krylov.extend(12)
    values, residuals, _ = krylov.ritz()
    V = krylov.basis[:12].mT
    S = torch.linalg.eigh(V.mT @ krylov.matrix @ V).eigenvectors
    true_residuals = (krylov.matrix @ V @ S - V @ S * values).norm(dim=0)
    torch.testing.assert_close(residuals, true_residuals, rtol=1e-6, atol=1e-12)
    usual = extreme_eigenvalues(Krylov(matrix_of(eigenvalues), start(300)), k=3)
    assert max(*usual.residuals, usual.smallest_residual) <= 1e-3 * 9
    rough = extreme_eigenvalues(Krylov(matrix_of(eigenvalues), start(300)), k=5, max_products=14)
    for value, residual in zip(rough.largest, rough.residuals, strict=True):
        assert (eigenvalues - value).abs().min() <= residual + 1e-12
    assert rough.products == 14


@pytest.mark.parametrize(
    "eigenvalues",
    [
        [0.0] * 5, [2.0] * 5, [1.0, 2.0, 3.0], [4.0], [-3.0, -3.0, 0.0, 0.0, 7.0, 7.0, 7.0],
        [5.0, 5.0 + 1e-9, 5.0 - 1e-9, 0.1, 0.1], [-1.0, -2.0, -2.0], [0.0, 0.0, 0.0, 1.0],
    ],
)  # fmt: skip
def test_small_and_degenerate_matrices(eigenvalues):
    found = extreme_eigenvalues(Krylov(matrix_of(eigenvalues), start(len(eigenvalues))), k=2)
    assert found.largest[0] == pytest.approx(max(eigenvalues), abs=1e-9)
    for value in found.largest:  # one of a repeated eigenvalue's copies is enough for Lanczos
        assert min(abs(value - truth) for truth in eigenvalues) < 1e-9
    assert found.smallest == pytest.approx(min(eigenvalues), abs=1e-9)


class RankOneAndIdentity:
    """1000 u u^T + 1e-6 I for a unit vector u of as many float32 entries as a network has weights.

    Its own product is taken in float64, so that all rounding is the caller's.
    """

    size = 2_000_000
    trace = 1000 + 1e-6 * size

    def __init__(self):
        u = torch.randn(self.size, generator=generator(), dtype=torch.float64)
        self.u = u / u.norm()

    def __matmul__(self, V):
        V64 = V.double()
        return (1000 * self.u[:, None] * (self.u @ V64) + 1e-6 * V64).to(V.dtype)


def test_sums_over_millions_of_entries_keep_float32s_digits():
    A = RankOneAndIdentity()
    krylov = Krylov(A, start(A.size).float())
    found = extreme_eigenvalues(krylov, k=1)
    assert abs(found.largest[0] - 1000) < 1e-5 * 1000
    for method in (hutchpp, xtrace):
        total, _ = method(A, A.u.float(), [A.size], num_products=4, generator=generator(1))
        assert total.value == pytest.approx(A.trace, rel=5e-6)


def test_density_and_its_moments():
    eigenvalues = outliers_and_bulk()
    signs = generator(1)
    starts = [rademacher(eigenvalues, generator=signs) for _ in range(40)]
    A = matrix_of(eigenvalues)
    first = Krylov(A, starts[0])
    first.extend(37)  # more than the others: it stands for a better quadrature, not for less
    density = spectral_density(A, starts[1:], steps=30, first=first)
    assert [len(nodes) for nodes in density.nodes] == [37] + [30] * 39
    for power in (1, 2):
        moment = density.moment(power)
        truth = (eigenvalues**power).sum().item()
        assert abs(moment.value - truth) < 4 * moment.stderr
    grid, values = density.on_grid()
    step = grid[1] - grid[0]
    assert sum(values) * step == pytest.approx(1, rel=1e-3)
    negative = (eigenvalues < 0).double().mean().item()
    assert density.share_below(0).value == pytest.approx(negative, abs=0.03)
    assert density.quantile(0.5) == pytest.approx(eigenvalues.median().item(), abs=0.03)


UNRELIABLE = ("weight_norm", "hardsigmoid", "attention", "transformer")  # PyTorch's dense Hessian


def matrix_over(objective, X, y, curvature="hessian"):
    return CurvatureMatrix(DataLoss.counted(objective, lambda: [(X, y)]), curvature)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", [n for n in CASES if n not in UNRELIABLE])
def test_networks_against_their_dense_matrix(name, curvature):
    objective, X, y, _, _ = setup(name, train=False)
    dense = (
        oracles.dense_hessian(objective, X, y)
        if curvature == "hessian"
        else oracles.dense_ggn(objective, X)
    )
    truth = torch.linalg.eigvalsh(dense)
    size = truth.abs().max().item()
    matrix = matrix_over(objective, X, y, curvature)
    krylov = Krylov(matrix, start(matrix.size))
    found = extreme_eigenvalues(krylov, k=3, rtol=1e-7)
    assert found.largest[0] == pytest.approx(truth[-1].item(), abs=1e-6 * size)
    for value, residual in zip(found.largest, found.residuals, strict=True):
        assert (truth - value).abs().min() <= residual + 1e-9 * size
    assert (truth - found.smallest).abs().min() <= found.smallest_residual + 1e-9
    density = spectral_density(matrix, [], steps=20, first=krylov)
    assert density.on_grid()[0][-1] >= truth[-1].item()


@pytest.mark.parametrize("name", [n for n in CASES if n not in UNRELIABLE])
def test_float32_products_agree_with_float64(name):
    objective, X, y, _, _ = setup(name, train=False)
    v = start(sum(p.numel() for p in objective.params.values()))[:, None]
    exact = matrix_over(objective, X, y) @ v
    model = copy.deepcopy(objective.model).float()
    X32 = X.float() if X.is_floating_point() else X
    y32 = y.float() if y.is_floating_point() else y
    single = Objective(model, trainable(model))
    rounded = matrix_over(single, X32, y32) @ v.float()
    assert (rounded.double() - exact).norm() < 1e-5 * exact.norm()


def descend(eigenvalues, lr, momentum, nesterov, weight_decay=0.0, steps=400):
    """PyTorch's SGD on a quadratic with these eigenvalues: how far the distance falls or grows."""
    A = matrix_of(eigenvalues)
    w = torch.nn.Parameter(start(len(eigenvalues)))
    first = w.norm().item()
    optimizer = torch.optim.SGD(
        [w], lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
    )
    for _ in range(steps):
        optimizer.zero_grad()
        (w @ A @ w / 2).backward()
        optimizer.step()
    return w.norm().item() / first


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.5, True)])
def test_threshold_is_where_gradient_descent_turns(momentum, nesterov, weight_decay):
    lr = 0.1
    bound = threshold(lr, momentum, nesterov=nesterov) - weight_decay
    below, above = [1.0, bound * 0.97], [1.0, bound * 1.03]
    for eigenvalues, stable in ((below, True), (above, False)):
        report = stability(
            eigenvalues[::-1], smallest=1.0, smallest_residual=0.0, negative=Share(0, 0, 0), size=2,
            lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov,
        )  # fmt: skip
        assert (report["linearly_stable"], report["num_unstable"]) == (stable, int(not stable))
        top = eigenvalues[1] + weight_decay
        assert report["largest_over_threshold"] == pytest.approx(top / (bound + weight_decay))
        assert report["largest_stable_lr"] == pytest.approx(lr * (bound + weight_decay) / top)
        assert report["fastest_time_constant"] == pytest.approx(1 / top)
    assert descend(below, lr, momentum, nesterov, weight_decay) < 0.1
    assert descend(above, lr, momentum, nesterov, weight_decay) > 10


def test_report_counts_and_says_it():
    settings = {
        "smallest": -0.5, "smallest_residual": 1e-6, "negative": Share(0.25, 0.1, 0.5), "size": 40,
        "weight_decay": 0.0,
    }  # fmt: skip
    convex = {**settings, "smallest": 0.1, "negative": Share(0, 0, 0)}
    report = stability([30.0, 21.0, 5.0], lr=0.1, momentum=0.0, **settings)
    assert (report["threshold"], report["num_unstable"]) == (20, 2)
    assert report["largest_over_threshold"] == 1.5
    assert report["largest_stable_lr"] == pytest.approx(2 / 30)
    assert report["flow_unstable_directions"] == 10
    assert report["flow_unstable_bounds"] == [4, 20]
    assert "not linearly stable here: 2 eigenvalue(s)" in sentence(report)
    assert "about 10 directions of negative curvature (between 4 and 20)" in sentence(report)
    calm = stability([3.0], lr=0.1, momentum=0.9, **convex)
    assert calm["threshold"] == pytest.approx(38)
    assert calm["linearly_stable"]
    assert "descent is linearly stable" in sentence(calm)
    saddle = stability([3.0], lr=0.1, momentum=0.9, **settings)
    assert (saddle["num_unstable"], saddle["linearly_stable"]) == (0, False)
    assert "no step overshoots" in sentence(saddle)
    assert "not linearly stable" in sentence(saddle)
    assert saddle["slowest_time_constant"] is None
    hill = stability([-0.1], lr=0.1, momentum=0.0, **settings)
    assert "moves away" in sentence(hill)
    decaying = {**convex, "smallest": -0.25, "weight_decay": 0.5}
    assert stability([3.5], lr=0.1, momentum=0.9, **decaying)["slowest_time_constant"] == 4
    unknown = {**decaying, "smallest_residual": 0.3}  # it may as well be 0
    assert stability([3.5], lr=0.1, momentum=0.9, **unknown)["slowest_time_constant"] == 2
    swift = stability([3.0], lr=0.1, momentum=0.9, nesterov=True, **settings)
    assert swift["threshold"] == pytest.approx(2 * 1.9 / (0.1 * 2.8))
    assert swift["largest_stable_lr"] == pytest.approx(2 * 1.9 / (3 * 2.8))
    assert "Nesterov" in sentence(swift)
    more = stability([30.0, 25.0], lr=0.1, momentum=0.0, **convex)
    assert more["num_unstable_is_lower_bound"]
    assert "2 or more" in sentence(more)


def test_negative_curvature_is_left_at_every_rate():
    assert descend([1.0, -0.1], lr=0.5, momentum=0.0, nesterov=False) > 10
    assert descend([1.0, -0.1], lr=0.05, momentum=0.0, nesterov=False) > 5


@pytest.mark.parametrize("cut", [-2.0, -0.5, -0.01, 0.0, 0.1, 0.29, 3.0, 20.0])
@pytest.mark.parametrize("steps", [3, 10, 40])
def test_the_share_below_a_cut_lies_within_its_bounds(cut, steps):
    """For the measure that the start vectors see, whatever the number of steps."""
    eigenvalues = outliers_and_bulk()
    A, z = matrix_of(eigenvalues), start(300)
    density = spectral_density(A, [z], steps=steps)
    Q = torch.linalg.eigh(A).eigenvectors
    seen = (Q.mT @ (z / z.norm())).square()
    truth = seen[torch.linalg.eigvalsh(A) < cut].sum().item()
    share = density.share_below(cut)
    assert share.low - 1e-9 <= truth <= share.high + 1e-9
    assert share.low <= share.value <= share.high


def test_bells_and_quantiles_of_a_known_density():
    nodes, weights = torch.tensor([0.0, 10.0]), torch.tensor([0.75, 0.25])
    density = Density(4, [nodes.double()], [weights.double()])
    grid, values = map(torch.tensor, density.on_grid(points=2001, width=0.01))
    peak = grid[values.argmax()].item()
    assert peak == pytest.approx(0, abs=0.01)
    near = values[(grid - 0.1).abs().argmin()] / values.max()  # a standard deviation of .1 away
    assert near.item() == pytest.approx(math.exp(-0.5), rel=0.02)
    assert (density.quantile(0.7), density.quantile(0.8)) == (0, 10)


def test_the_density_of_a_zero_matrix():
    density = spectral_density(matrix_of([0.0] * 9), [start(9)], steps=4)
    grid, values = density.on_grid()
    assert sum(values) * (grid[1] - grid[0]) == pytest.approx(1, rel=1e-3)
