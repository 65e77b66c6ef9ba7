"""Estimating leaves everything as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.data_loss import DataLoss
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.trace.estimators import Stop, estimate_trace, signs_sampler
from hesstrace_cli.curvature.trace.exact import PerExampleTrace
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.errors import ConfigError, ModelError
from tests.curvature import oracles


def split():
    return TensorSplit(torch.randn(20, 8), torch.arange(20) % 3, Preprocess())


METHODS = ["auto", "exact", "hutchinson", "dropout", "hutch++", "xtrace"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_state_is_untouched(curvature, method):
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model[3].bias.requires_grad_(False)
    model[1].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    data = split()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    config = EstimateConfig(num_probes=6, curvature=curvature, method=method)
    first, second = (estimate(model, data, config).result for _ in range(2))
    other = estimate(model, data, dataclasses.replace(config, seed=1)).result
    assert first == second
    if method in ("auto", "exact"):
        assert other == first
    else:
        assert other.total.value != first.total.value
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None
    assert not model[3].bias.requires_grad
    assert "3.bias" not in first.tensors


class AlwaysDropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, X):
        return self.linear(nn.functional.dropout(X, 0.5, training=True))


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_too_few_products(method):
    with pytest.raises(ConfigError, match="at least"):
        estimate(nn.Linear(8, 3), split(), EstimateConfig(num_probes=2, method=method))


def test_active_dropout_is_refused():
    with pytest.raises(ModelError, match="Dropout"):
        estimate(AlwaysDropping(), split(), EstimateConfig(num_probes=1))


class Scaled(nn.Module):
    """A network whose logits are multiplied by a factor."""

    def __init__(self, factor, activation=nn.GELU, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 30), activation(), nn.Linear(30, classes))
        self.factor = factor

    def forward(self, X):
        return self.layers(X) * self.factor


def dense_trace(model, data):
    objective = Objective(model, trainable(model))
    X, y = next(data.batches(len(data)))
    return oracles.dense_hessian(objective, X, y).trace().item()


def double(n=20, seed=0, spread=1.0, classes=3):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 8, generator=g, dtype=torch.float64)
    X = X * spread ** torch.randn(n, 1, generator=g, dtype=torch.float64)
    return TensorSplit(X, torch.arange(n) % classes, Preprocess(), torch.float64)


CASES = {
    "exact": (nn.ReLU, {"method": "exact"}),
    "signs": (nn.ReLU, {"num_probes": 4}),
    "exact+hutchinson": (nn.GELU, {"num_probes": 4}),
    "signs+hutchinson": (nn.GELU, {"num_probes": 4}),
}


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("name", CASES)
def test_traces_of_any_size(name, size):
    activation, settings = CASES[name]
    # H - G is of first order in the logits' scale, G of second
    scale = size if activation is nn.GELU else size**0.5
    classes = 40 if "signs" in name else 3  # more than 32
    model = Scaled(min(1.0, scale), activation, classes).double()
    data = double(classes=classes)
    if size > 1:  # large inputs, small weights: the logits stay as they are
        data = dataclasses.replace(data, inputs=data.inputs * size**0.5)
        model.layers[0].weight.data /= size**0.5
    truth = dense_trace(model, data)
    assert 0.01 < abs(truth) / size < 100
    got = estimate(model, data, EstimateConfig(batch_size=7, **settings))
    assert got.method == name
    total = got.result.total
    assert abs(total.value - truth) <= 1e-9 * truth + 5 * (
        truth if total.stderr is None else total.stderr
    )


@pytest.mark.parametrize("method", ["auto", "exact", "hutchinson", "dropout", "hutch++", "xtrace"])
def test_a_network_without_curvature_has_trace_zero(method):
    model = Scaled(0.0, nn.ReLU).double()
    result = estimate(model, double(), EstimateConfig(method=method, num_probes=6)).result
    assert (result.total.value, result.total.stderr) == (0.0, 0.0)


@pytest.mark.parametrize("labels", [[0], [1, 1, 1]])
def test_one_example_and_one_class(labels):
    model = Scaled(1.0).double()
    X = torch.randn(len(labels), 8, dtype=torch.float64)
    data = TensorSplit(X, torch.tensor(labels), Preprocess(), torch.float64)
    total = estimate(model, data, EstimateConfig(rtol=0.05)).result.total
    assert abs(total.value - dense_trace(model, data)) < 4 * total.stderr


def test_a_negative_trace():
    class Concave(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((300, 3), 0.1))

        def forward(self, X):
            signs = torch.tensor([1.0, -1.0, -1.0])
            return (X.repeat(1, 38)[:, :300] @ self.weight.square()) * signs

    X = torch.rand(9, 8) + 1
    data = TensorSplit(X.double(), torch.zeros(9, dtype=torch.int64), Preprocess(), torch.float64)
    model = Concave().double()
    truth = dense_trace(model, data)
    assert truth < 0
    total = estimate(model, data, EstimateConfig(rtol=0.01)).result.total
    assert abs(total.value / truth - 1) < 0.05


def test_exact_agrees_with_xtrace_run_to_convergence():
    model, data = Scaled(1.0, nn.ReLU).double(), double(60)
    exact = estimate(model, data, EstimateConfig(method="exact", batch_size=16)).result.total
    products = EstimateConfig(method="xtrace", num_probes=720, batch_size=16)
    converged = estimate(model, data, products).result.total
    assert converged.value == pytest.approx(exact.value, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["signs", pytest.param("exact+hutchinson", marks=pytest.mark.slow)]
)
def test_intervals_cover_the_truth_where_curvature_is_heavy_tailed(name):
    """95 % intervals over 400 seeds; a few examples carry most of the trace."""
    activation, _ = CASES[name]
    model, data = Scaled(2.0, activation).double(), double(24, spread=3.0)
    truth = dense_trace(model, data)
    hits = 0
    for seed in range(400):
        settings = {"num_probes": 12, "batch_size": 8, "seed": seed, "max_passes": 1}
        if name == "signs":
            objective = Objective(model, trainable(model))
            sampler = signs_sampler(PerExampleTrace(objective, next(data.batches(8))[0]))
            total = estimate_trace(
                sampler, DataLoss.counted(objective, lambda: data.batches(8)), num_probes=12,
                stop=Stop(None), generator=torch.Generator().manual_seed(seed),
            ).total  # fmt: skip
        else:
            total = estimate(model, data, EstimateConfig(**settings)).result.total
        low, high = total.interval()
        hits += low <= truth <= high
    assert 0.92 <= hits / 400 <= 0.98


def test_the_error_of_a_subset_covers_the_whole():
    """Random halves of the examples: the whole's trace lies within two errors of 95 % of them."""
    model, data = Scaled(1.0, nn.ReLU).double(), double(80)
    config = EstimateConfig(method="exact")
    truth = estimate(model, data, config).result.total.value
    hits = 0
    for seed in range(200):
        order = torch.randperm(80, generator=torch.Generator().manual_seed(seed))[:40]
        part = estimate(model, data.subset(order), config, population=80).result
        hits += abs(part.total.value - truth) <= 2 * part.subset_stderr
    assert 0.9 <= hits / 200 <= 0.99


def test_many_classes_go_by_signs():
    model, data = Scaled(1.0, nn.ReLU, classes=40).double(), double(60, classes=40)
    got = estimate(model, data, EstimateConfig(rtol=0.05, max_passes=100))
    assert got.method == "signs"
    assert abs(got.result.total.value - dense_trace(model, data)) < 4 * got.result.total.stderr
