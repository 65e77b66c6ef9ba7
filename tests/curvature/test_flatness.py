"""Sharpness and slices against closed forms on quadratics, and against the Hessian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.flatness import (
    Landscape,
    average_sharpness,
    random_direction,
    slice_losses,
    worst_sharpness,
)
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.tasks import Classification, Regression
from tests.curvature import oracles


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


CLASSES = Classification()


def landscape_of(model, X, y, task=CLASSES, batch_size=7):
    model = model.double().eval()
    objective = Objective(model, trainable(model), task)
    batches = list(zip(X.split(batch_size), y.split(batch_size), strict=True))
    return Landscape(DataLoss.counted(objective, lambda: batches))


@pytest.fixture
def data():
    X = torch.randn(20, 6, generator=generator(1), dtype=torch.float64)
    return X, torch.randint(0, 3, (20,), generator=generator(2))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def quadratic(data):
    """Least squares at its minimum: L(w + d) - L(w) = d^T H d / 2 at every distance."""
    X, _ = data
    y = X @ torch.randn(6, 1, generator=generator(3), dtype=torch.float64)
    model = nn.Linear(6, 1, bias=False)
    landscape = landscape_of(model, X, y, Regression())
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(X, y).solution.mT)
    return landscape, 2 * X.mT @ X / len(X)


def test_quadratic(data):
    landscape, H = quadratic(data)
    radius = 0.3
    average = average_sharpness(
        landscape, radius=radius, normalized=False, num_directions=400, generator=generator()
    )
    assert abs(average.value - radius**2 * H.trace().item() / 12) < 4 * average.stderr
    worst = worst_sharpness(
        landscape, radius=radius, normalized=False, steps=60, generator=generator()
    )
    top = torch.linalg.eigvalsh(H)[-1].item()
    assert worst == pytest.approx(radius**2 * top / 2, rel=1e-6)


def test_small_radius_gives_the_trace(data, network):
    landscape = landscape_of(network, *data)
    H = oracles.dense_hessian(landscape.objective, *data)
    radius = 1e-3
    average = average_sharpness(
        landscape, radius=radius, normalized=False, num_directions=500, generator=generator()
    )
    truth = radius**2 * H.trace().item() / (2 * len(H))
    assert abs(average.value - truth) < 4 * average.stderr
    assert average.stderr < 0.2 * truth


def test_worst_direction_is_the_gradient_where_that_counts(data, network):
    landscape = landscape_of(network, *data)
    radius = 1e-4
    _, grad = landscape.gradient({})
    size = torch.cat([g.flatten() for g in grad.values()]).norm().item()
    worst = worst_sharpness(
        landscape, radius=radius, normalized=False, steps=5, generator=generator()
    )
    assert worst == pytest.approx(radius * size, rel=1e-2)


def rescaled(network, factor):
    """The same function: ReLU passes a positive factor on."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.startswith("0."):
                p.mul_(factor)
            elif name == "2.weight":
                p.div_(factor)
    return network


@pytest.mark.parametrize("normalized", [True, False])
def test_rescaling_a_relu_network(data, network, normalized):
    settings = {"radius": 0.1, "normalized": normalized}

    def measured():
        landscape = landscape_of(network, *data)
        return (
            average_sharpness(landscape, num_directions=3, generator=generator(), **settings).value,
            worst_sharpness(landscape, steps=4, generator=generator(), **settings),
        )

    before = measured()
    rescaled(network, 10.0)
    after = measured()
    if normalized:
        assert after == pytest.approx(before, rel=1e-9)
    else:
        assert after[1] > 2 * before[1]


def test_filter_normalized_directions(network):
    params = trainable(network.double())
    d = random_direction(params, normalized=True, generator=generator())
    assert set(d) == {"0.weight", "2.weight"}
    for name, tensor in d.items():
        torch.testing.assert_close(tensor.norm(dim=1), params[name].norm(dim=1))
    plain = random_direction(params, normalized=False, generator=generator())
    assert sum(t.square().sum() for t in plain.values()).item() == pytest.approx(1)


def test_slices_are_the_loss(data, network):
    landscape = landscape_of(network, *data)
    params = landscape.objective.params
    d = [random_direction(params, normalized=True, generator=generator(i)) for i in (0, 1)]
    grid = [-0.5, 0.0, 0.5]
    before = {n: p.detach().clone() for n, p in params.items()}
    line = slice_losses(landscape, d[:1], grid)
    plane = slice_losses(landscape, d, grid)
    assert line == pytest.approx([row[1] for row in plane])
    for n, p in params.items():
        assert torch.equal(p.detach(), before[n])
    with torch.no_grad():
        for n in d[0]:
            params[n].add_(0.5 * d[0][n] - 0.5 * d[1][n])
    X, y = data
    moved = nn.functional.cross_entropy(network(X), y).item()
    assert plane[2][0] == pytest.approx(moved)


def test_worst_by_filter_is_no_lower_than_a_search(data, network):
    """Among 2,000 random displacements of the same size none rises higher."""
    landscape, settings = landscape_of(network, *data), {"normalized": True}
    worst = worst_sharpness(landscape, radius=0.2, steps=10, generator=generator(), **settings)
    draws = generator(5)
    directions = (
        random_direction(landscape.objective.params, generator=draws, **settings)
        for _ in range(2000)
    )
    found = max(landscape.loss({n: 0.2 * t for n, t in d.items()}) for d in directions)
    assert worst > found - landscape.loss({}) > 0


def test_nothing_to_move():
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    X = torch.ones(4, 3, dtype=torch.float64)
    landscape = landscape_of(model, X, torch.tensor([0, 1, 0, 1]))
    settings = {"radius": 0.1, "normalized": True, "generator": generator()}
    assert average_sharpness(landscape, num_directions=2, **settings).value == 0
    assert worst_sharpness(landscape, steps=3, **settings) == 0


def test_ragged_batches_give_one_answer(data, network):
    whole = landscape_of(network, *data, batch_size=20).gradient({})
    parts = landscape_of(network, *data, batch_size=6).gradient({})
    assert parts[0] == pytest.approx(whole[0])
    torch.testing.assert_close(parts[1], whole[1])


def test_filters_of_a_convolution_are_its_output_channels():
    torch.manual_seed(0)
    params = dict(nn.Conv2d(3, 4, 2).named_parameters())
    (direction,) = random_direction(params, normalized=True, generator=generator()).values()
    for d, w in zip(direction, params["weight"], strict=True):
        torch.testing.assert_close(d.norm(), w.detach().norm())


def test_one_ascent_step_from_a_quadratics_slope(data):
    """It goes to rho g / |g|, where the loss is known in closed form."""
    landscape, H = quadratic(data)
    model, radius = landscape.objective.model, 0.3
    with torch.no_grad():
        model.weight.add_(0.5)
    e = torch.full((6,), 0.5, dtype=torch.float64)
    start = random_direction(landscape.objective.params, normalized=False, generator=generator())
    g = H @ (e + radius * start["weight"][0])
    ends = [radius * g / g.norm(), radius * start["weight"][0]]
    rises = [(d @ H @ d / 2 + e @ H @ d).item() for d in ends]
    found = worst_sharpness(
        landscape, radius=radius, normalized=False, steps=1, generator=generator()
    )
    assert found == pytest.approx(max(rises), rel=1e-6)


def test_an_overflow_is_infinitely_sharp(data, network):
    landscape = landscape_of(network, *data)
    with torch.no_grad():
        network[2].weight.mul_(1e200)
    assert (
        worst_sharpness(landscape, radius=1e200, normalized=False, steps=2, generator=generator())
        == math.inf
    )
