"""Estimating leaves everything as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.errors import ConfigError, ModelError
from hesstrace_cli.estimation import estimate


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
