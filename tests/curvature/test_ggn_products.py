"""Products with G where forward mode has no derivative, against the matrix written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.autodiff import differentiable
from hesstrace_cli.autodiff.calls import native_outputs, trainable
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature import ggn
from hesstrace_cli.curvature.ggn import ggn_vp
from hesstrace_cli.curvature.matrix import ggn_product
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.errors import DerivativeError
from tests.curvature import oracles
from tests.curvature.zoo import CASES, Recurrent, make

RECURRENT = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "tanh": lambda: Recurrent(nn.RNN),
    "two_layers_both_ways": lambda: Both(),
}


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, X):
        return self.head(self.cell(X.reshape(len(X), 2, 4))[0].mean(1))


def probe_of(params):
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}


@pytest.mark.parametrize("name", CASES)
def test_by_two_backward_passes(name, monkeypatch):
    model, X, y = make(name, train=False)
    objective = Objective(model, trainable(model))
    v = probe_of(objective.params)

    def no_forward_mode(*_):
        raise NotImplementedError(
            "Trying to use forward AD with something that does not support it"
        )

    forward = ggn_vp(lambda p: objective.outputs(p, X), objective.params, v, objective.task, y)
    monkeypatch.setattr(ggn, "_pushed_forward", no_forward_mode)
    product = ggn_vp(lambda p: objective.outputs(p, X), objective.params, v, objective.task, y)
    truth = oracles.dense_ggn(objective, X) @ oracles.flatten(v)
    torch.testing.assert_close(oracles.flatten(product), truth, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(oracles.flatten(forward), truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_in_float32(name):
    """Their fused kernels in float32 have no forward derivative."""
    torch.manual_seed(0)
    model = RECURRENT[name]().eval()
    X = torch.randn(6, 8)
    objective = Objective(model, trainable(model))
    v = probe_of(objective.params)
    product = ggn_product(objective, X, torch.arange(len(X)) % 3, v)
    exact = copy.deepcopy(model).double()
    G = oracles.dense_ggn(Objective(exact, trainable(exact)), X.double())
    truth = G @ oracles.flatten(v).double()
    torch.testing.assert_close(oracles.flatten(product).double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["hutchinson", "dropout", "hutch++", "xtrace", "auto"])
def test_estimates_of_a_recurrent_model(method):
    torch.manual_seed(0)
    model = Recurrent(nn.LSTM).eval()
    X = torch.randn(12, 8)
    data = TensorSplit(X, torch.arange(12) % 3, Preprocess())
    config = EstimateConfig(curvature="ggn", method=method, rtol=0.05, batch_size=5)
    total = estimate(model, data, config).result.total
    exact = copy.deepcopy(model).double()
    truth = oracles.dense_ggn(Objective(exact, trainable(exact)), X.double()).trace().item()
    assert abs(total.value - truth) < max(4 * total.stderr, 1e-4 * truth)


class Square(torch.autograd.Function):
    """Differentiable as often as one likes, in reverse mode alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Once(Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(8, 4), nn.Linear(4, 3), function

    def forward(self, X):
        return self.b(self.function.apply(self.a(X)))


def test_a_function_without_a_forward_derivative():
    torch.manual_seed(0)
    model = Custom(Square).double()
    X = torch.randn(5, 8, dtype=torch.float64)
    objective = Objective(model, trainable(model))
    v = probe_of(objective.params)
    truth = oracles.dense_ggn(objective, X) @ oracles.flatten(v)
    product = oracles.flatten(ggn_product(objective, X, torch.arange(len(X)) % 3, v))
    torch.testing.assert_close(product, truth, rtol=1e-9, atol=1e-10)


def test_neither_forward_nor_second_derivative():
    model = Custom(Once)
    objective = Objective(model, trainable(model))
    with pytest.raises(DerivativeError, match="Custom"):
        ggn_product(objective, torch.randn(5, 8), torch.arange(5) % 3, probe_of(objective.params))


def test_cudnn_is_off_where_a_recurrent_layer_is_called(monkeypatch):
    """cuDNN's have no derivative in eval mode; its flags are left as they were."""
    seen, native = [], torch.lstm

    def lstm(*args, **kwargs):
        seen.append(torch.backends.cudnn.enabled)
        return native(*args, **kwargs)

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    for table in (differentiable._FIRST_ORDER, differentiable._SECOND_ORDER,
                  differentiable._ANY_ORDER):  # fmt: skip
        monkeypatch.setitem(table, torch.lstm, differentiable._without_fused(lstm))
    model, X = Recurrent(nn.LSTM).eval(), torch.randn(3, 8)
    native_outputs(model, X)
    Objective(model, trainable(model)).outputs({}, X)
    assert seen == [False, False]
    assert torch.backends.cudnn.enabled
    assert torch.backends.cudnn.deterministic
