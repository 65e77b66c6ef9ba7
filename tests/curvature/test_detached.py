"""Where a model takes something off the graph, H is said to be that of the rest, and not exact."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.autodiff.calls import native_outputs, trainable
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.detached import CutWatch, Detached, check_attached
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import ConfigError
from tests.curvature import oracles
from tests.curvature.test_batches import BATCH, build, data, normal
from tests.curvature.zoo import CASES, make


class Through(torch.autograd.Function):
    """Rounds, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


def hooked(h):
    if h.requires_grad:
        h.register_hook(lambda g: -g)
    return h


@torch.no_grad()
def frozen(h):
    return h.abs().mean(1, keepdim=True)


CUT = {
    "detach": lambda h: h / h.detach().norm(dim=1, keepdim=True),
    "no_grad": lambda h: h / frozen(h),
    ".data": lambda h: h * h.data.exp(),
    "item": lambda h: h * float(h.abs().sum(1).mean().item() > -1) * h[0].abs().sum().item(),
    "tolist": lambda h: h * torch.tensor(h.abs().sum(1).tolist(), dtype=h.dtype)[:, None],
    "straight through": lambda h: h + (torch.sign(h) - h).detach(),
    "quantized": lambda h: h + ((h * 3).round() / 3 - h).detach(),
    "an autograd.Function": lambda h: Through.apply(h * 4),
    "a hook": hooked,
    "a new tensor": lambda h: h * torch.tensor(h.detach().cpu().numpy()).exp(),
    "a part": lambda h: torch.cat([h[:, :2].detach(), h[:, 2:]], 1),
    "all of it": lambda h: h.detach(),
    "a copy": lambda h: h * h.detach().clone().square(),
    "a stop among others": lambda h: F.relu(h) + 0.3 * F.relu(h).detach() * h,
}


@pytest.mark.parametrize("method", ["auto", "hutchinson", "xtrace"])
@pytest.mark.parametrize("width", [6, 60])
@pytest.mark.parametrize("name", CUT)
def test_what_is_taken_off_the_graph_is_said(name, width, method):
    model = build(lambda m, X: CUT[name](X @ m.a) @ m.head, a=(8, width), head=(width, 3))
    split = data(normal(16))
    before = [p.detach().clone() for p in model.parameters()]
    settings = {"num_probes": 4, "max_passes": 1, "batch_size": BATCH}
    got = estimate(model, split, EstimateConfig(method=method, **settings))
    assert got.method in ("hutchinson", "xtrace")
    assert "held constant" in got.reason
    for curvature in ("hessian", "ggn"):
        with pytest.raises(ConfigError, match="held constant"):
            estimate(model, split, EstimateConfig(method="exact", curvature=curvature))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["detach", "no_grad", "a part"])
def test_the_curvature_is_that_with_the_rest_constant(name):
    model = build(lambda m, X: CUT[name](X @ m.a) @ m.head, a=(8, 6), head=(6, 3))
    split = data(normal(16))
    objective = Objective(model, trainable(model))
    truth = oracles.dense_hessian(objective, *next(split.batches(16))).trace().item()
    total = estimate(model, split, EstimateConfig(rtol=0.02)).result.total
    assert abs(total.value - truth) < 4 * total.stderr


def clamped(m, X):
    """A scale that is off the graph, and 1 for small examples."""
    hidden = F.relu(X @ m.a)
    return hidden / hidden.detach().norm(dim=1, keepdim=True).clamp(min=8) @ m.head


def test_what_only_later_batches_take_off_the_graph():
    model = build(clamped, a=(8, 60), head=(60, 3))
    X = normal(24)
    X[:BATCH] *= 0.1
    X[BATCH:] *= 5
    check_attached(Objective(model, trainable(model)), X[:BATCH])
    got = estimate(model, data(X), EstimateConfig(batch_size=BATCH, num_probes=2))
    assert got.method == "hutchinson"
    assert "in batch" in got.reason
    with pytest.raises(ConfigError, match="held constant"):
        estimate(model, data(X), EstimateConfig(batch_size=BATCH, method="exact"))


HONEST = {
    "detached and not used": lambda m, X: (lambda h: (h.detach().norm(), F.relu(h) @ m.head)[1])(
        X @ m.a
    ),
    "a mask": lambda m, X: (lambda h: h * (h.detach() > 0) @ m.head)(X @ m.a),
    "places": lambda m, X: (lambda h: h.gather(1, h.detach().sort(1)[1]) @ m.head)(X @ m.a),
    "a scale of the inputs": lambda m, X: F.relu(X @ m.a) / X.detach().norm().item() @ m.head,
    "zeros like it": lambda m, X: torch.maximum(X @ m.a, torch.zeros_like(X @ m.a)) @ m.head,
    "units on their kinks": lambda m, X: F.relu((X * 0) @ m.a) @ m.head + X @ m.b,
    "the largest, subtracted": lambda m, X: (lambda h: h - h.detach().amax(1, keepdim=True))(
        X @ m.b
    )
    .log_softmax(1),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_no_false_alarm(name):
    model = build(HONEST[name], a=(8, 6), b=(8, 3), head=(6, 3))
    got = estimate(model, data(normal(16)), EstimateConfig(batch_size=BATCH))
    assert "held constant" not in got.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_layers_of_every_kind_are_attached(name, dtype):
    model, X, _ = make(name, train=False)
    model, X = model.to(dtype), X.to(dtype)
    objective = Objective(model, trainable(model))
    check_attached(objective, X)
    with CutWatch() as watch:
        native_outputs(model, X)
    assert not watch.found


def test_padding_and_normed_weights_are_attached():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 4, padding_idx=0)
            self.head = parametrizations.spectral_norm(nn.Linear(4, 3))
            self.table.weight.data[0] = 1.0

        def forward(self, X):
            return self.head(self.table((X.abs() * 3).long().clamp(max=4)).mean(1))

    torch.manual_seed(0)
    model = Words().eval()
    check_attached(Objective(model, trainable(model)), normal(8).float())


def test_a_model_that_runs_in_single_precision_alone():
    class Single(nn.Module):
        def __init__(self, cut):
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head, self.cut = nn.RNN(8, 6), nn.Linear(6, 3), cut

        def forward(self, X):
            state = torch.from_numpy(X.detach().numpy().astype("float32")[None, :, :6].copy())
            hidden = self.cell(X[None], state)[0][0]
            return self.head(hidden * hidden.detach().exp() if self.cut else hidden)

    for cut in (False, True):
        model = Single(cut)
        objective = Objective(model, trainable(model))
        if cut:
            with pytest.raises(Detached):
                check_attached(objective, normal(8).float())
        else:
            check_attached(objective, normal(8).float())
