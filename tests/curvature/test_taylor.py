"""Taylor propagation where models do more than call functions; the zoo is in test_derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.curvature.hessian import loss_and_form, quadratic_form
from hesstrace_cli.curvature.objective import Objective
from tests.curvature import oracles


class Net(nn.Module):
    """The body says what happens between two linear maps."""

    def __init__(self, body):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head, self.body = nn.Linear(5, 6), nn.Linear(6, 3), body

    def forward(self, X):
        return self.head(self.body(self.inner(X), self.inner.weight))


def in_place_relu(h, W):
    before = h * 1.0
    F.relu(before, inplace=True)
    return before + (h + 1.0).relu_()


def in_place_sums(h, W):
    h = h * 2
    h += 1
    h *= 0.5
    h.add_(torch.tanh(h))
    return h / 10


def a_sum_into_a_dropped_branch(h, W):
    out = torch.sin(W.sum()) * torch.ones_like(h)
    out += h * 0.5
    return out


def arithmetic(h, W):
    pieces = torch.stack(
        [1 - h, h - 1, 2 * h, h / 3, -h, 3 / (2 + h * h), torch.sub(h, h, alpha=2)]
    )
    return pieces.pow(2).sum(0) + h @ W @ W.mT / 10 - torch.rsub(h, 1).mean()


def lists(h, W):
    a, b = h.chunk(2, -1)
    values, places = h.max(-1, keepdim=True)
    joined = torch.cat([a * b, torch.exp(b)], -1)
    return joined + values * (places > 1) + torch.where(h > 0, h, h.sin()) * h.shape[1]


def products(h, W):
    outer = torch.einsum("ni,nj->nij", h, h)
    return torch.bmm(outer, h[:, :, None]).squeeze(-1) + outer.mean((1, 2), keepdim=True)[:, 0]


BODIES = [in_place_relu, in_place_sums, a_sum_into_a_dropped_branch, arithmetic, lists, products]


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    X = torch.randn(7, 5, generator=g, dtype=torch.float64)
    return X, torch.randint(0, 3, (7,), generator=g)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kept", ["all", "head", "inner"])
def test_value_and_gradient_of_the_dense_form(data, body, kept):
    X, y = data
    objective = Objective(Net(body).double(), trainable(Net(body).double()))
    objective = Objective(objective.model, trainable(objective.model))
    params = objective.params
    g = torch.Generator().manual_seed(2)
    v = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()
         if kept == "all" or n.startswith(kept)}  # fmt: skip

    def loss(p):
        return objective.loss(p, X, y)

    plain, form = loss_and_form(loss, params, v)
    assert plain.item() == pytest.approx(loss(params).item(), rel=1e-12)
    flat = oracles.flatten({n: v.get(n, torch.zeros_like(p)) for n, p in params.items()})
    H = oracles.dense_hessian(objective, X, y)
    assert form.item() == pytest.approx((flat @ H @ flat).item(), rel=1e-9)
    other = quadratic_form(loss, params, v, mode="reverse")
    torch.testing.assert_close(gradient(form, params), gradient(other, params))
    torch.testing.assert_close(gradient(plain, params), gradient(loss(params), params))


class Surrogate(torch.autograd.Function):
    """A step whose backward is that of the identity: no rule can know it."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


def without_graph(h, W):
    with torch.no_grad():
        scale = h.abs().max()
    return h / scale


def overwritten(h, W):
    h = h * 1.0
    h[0] = 0.0
    return h


def clamped(h, W):
    h = h * 1.0
    h.clamp_(min=0)
    return h


@pytest.mark.parametrize(
    "body", [lambda h, W: Surrogate.apply(h), without_graph, overwritten, clamped]
)
def test_what_has_no_rule_is_refused(data, body):
    X, y = data
    objective = Objective(Net(body).double(), {})
    params = trainable(objective.model)
    v = {n: torch.ones_like(p) for n, p in params.items()}
    with pytest.raises(NotImplementedError):
        loss_and_form(lambda p: objective.loss({**params, **p}, X, y), params, v)


def test_dropped_tensors_carry_no_derivative(data):
    X, y = data
    net = Net(lambda h, W: torch.tanh(h)).double()
    seen = []
    net.head.register_forward_pre_hook(lambda _m, args: seen.append(args[0].parts))
    objective = Objective(net, trainable(net))
    v = {"head.weight": torch.ones_like(net.head.weight)}
    loss_and_form(lambda p: objective.loss(p, X, y), objective.params, v)
    assert seen[0][1:] == (None, None)
    v = {"inner.bias": torch.ones_like(net.inner.bias)}
    loss_and_form(lambda p: objective.loss(p, X, y), objective.params, v)
    assert seen[1][1] is not None


RANDOM = {
    "dropout": lambda h, W: F.dropout(torch.tanh(h), 0.5) + F.dropout(h, 0.3),
    "alpha": lambda h, W: F.alpha_dropout(torch.tanh(h), 0.5, training=True),
    "channels": lambda h, W: F.dropout1d(torch.tanh(h)[None], 0.5)[0],
    "rrelu": lambda h, W: F.rrelu(h, training=True) ** 2,
    "attention": lambda h, W: F.scaled_dot_product_attention(h, h.sin(), h, dropout_p=0.5),
}


@pytest.mark.parametrize("body", RANDOM.values(), ids=RANDOM)
def test_what_is_drawn_is_what_an_ordinary_pass_draws(body):
    model = Net(body).double()
    X, y = torch.randn(4, 5, dtype=torch.float64), torch.arange(4) % 3
    objective = Objective(model, trainable(model))
    g = torch.Generator().manual_seed(1)
    v = {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in objective.params.items()}

    def drawn(function):
        torch.manual_seed(7)
        return function(), torch.rand(())

    def loss(params):
        return objective.loss(params, X, y)

    (value, form), after = drawn(lambda: loss_and_form(loss, objective.params, v))
    plain, after_plain = drawn(lambda: loss(objective.params))
    truth, _ = drawn(lambda: quadratic_form(loss, objective.params, v, mode="reverse"))
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(form, truth)
    assert torch.equal(after, after_plain)
