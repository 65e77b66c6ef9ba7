"""Users' norm rules: taken where they hold, left out where they do not, named where wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hesstrace_cli.curvature.checks.norm_rules import refuse_wrong_rules
from hesstrace_cli.curvature.per_example.by_example import ByExample
from hesstrace_cli.curvature.per_example.registry import OuterProducts, norm_rule
from hesstrace_cli.curvature.probes import Draws, draw_signs
from hesstrace_cli.curvature.trace.exact import PerExampleTrace
from hesstrace_cli.errors import DerivativeError, ModelError
from tests.conftest import invoke
from tests.curvature.test_by_example import (
    assert_same,
    forward,
    generator,
    per_example_truth,
    truthful,
)
from tests.curvature.test_exact import build, truth_of


class Gain(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x, factor=1.0):
        return (x * F.softplus(self.weight) * factor).sinh()


@norm_rule(Gain)
def of_gain(layer, g, x, factor=1.0):
    inner = x * F.softplus(layer.weight) * factor
    full = g * inner.cosh() * x * layer.weight.sigmoid() * factor
    return {"weight": full.flatten(1, -layer.weight.dim() - 1).sum(1) if full.dim() > 2 else full}


class Shift(Gain):
    def forward(self, x):
        return x + self.weight.exp()


@norm_rule(Shift)
def of_shift(layer, g, x):
    return {"weight": (g + 0 * x) * layer.weight.exp()}


class Mix(nn.Module):
    def __init__(self, positions, out):
        super().__init__()
        self.weight, self.shift = (
            nn.Parameter(torch.randn(positions, out)), nn.Parameter(torch.randn(out))
        )  # fmt: skip

    def forward(self, x):
        return torch.einsum("nld,lm->nmd", x, self.weight) + self.shift.exp()[:, None]


@norm_rule(Mix)
def of_mix(layer, g, x):
    return {"weight": OuterProducts(x.mT, g.mT), "shift": g.sum(2) * layer.shift.exp()}


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, number, w):
        ctx.save_for_backward(x, w)
        ctx.number = number
        return number * x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return ctx.number * g * w, None, ctx.number * (g * x).sum(0).reshape(w.shape)


@norm_rule(Times)
def of_times(ctx, g):
    x, _ = ctx.saved_tensors
    return {1: ctx.number * g * x}


class Net(nn.Module):
    """Layers by name, and how they are called."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, X):
        return self.function(self, X)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def same_weight(first, second):
    second.weight = first.weight
    return {"a": first, "b": second}


def frozen(layer, name):
    getattr(layer, name).requires_grad_(False)
    return layer


def head(features=8):
    return nn.Linear(features, 3)


def folded(m, X):
    """Rows of an example one after another."""
    return m.head(m.gain(torch.tanh(X).reshape(-1, 4)).reshape(len(X), -1))


def strided(m, X):
    """Rows of an example N apart."""
    steps = torch.tanh(X).reshape(-1, 2, 4).transpose(0, 1).reshape(-1, 4)
    return m.head(m.gain(steps).reshape(2, len(X), 4).mean(0))


BY_RULE = {
    "a layer": lambda: Net(
        lambda m, X: m.head(m.gain(m.a(X))), a=head(), gain=Gain(3), head=head(3)
    ),
    "by keyword, at the end": lambda: Net(
        lambda m, X: m.gain(m.a(X), factor=0.5), a=head(), gain=Gain(3)
    ),
    "positions": lambda: Net(
        lambda m, X: m.head(m.gain(X.reshape(-1, 2, 4)).flatten(1)), gain=Gain(4), head=head()
    ),
    "outer products": lambda: Net(
        lambda m, X: m.head(torch.tanh(m.mix(torch.tanh(m.a(X)).reshape(-1, 2, 2))).flatten(1)),
        a=nn.Linear(8, 4), mix=Mix(2, 5), head=head(10),
    ),
    "outer products over many positions": lambda: Net(
        lambda m, X: m.head(torch.tanh(m.mix(torch.tanh(m.a(X)).reshape(-1, 2, 9))).flatten(1)),
        a=nn.Linear(8, 18), mix=Mix(2, 2), head=head(18),
    ),
    "rows folded into the batch": lambda: Net(folded, gain=Gain(4), head=head()),
    "rows folded, sequence first": lambda: Net(strided, gain=Gain(4), head=head(4)),
    "an operation": lambda: Net(
        lambda m, X: m.head(torch.tanh(Times.apply(m.a(X), 3.0, m.w))), a=head(), w=parameter(3),
        head=head(3),
    ),
    "an operation on a view": lambda: Net(
        lambda m, X: m.head(torch.tanh(Times.apply(m.a(X), 3.0, m.w.reshape(3)))), a=head(),
        w=parameter(1, 3), head=head(3),
    ),
    "one of its weights frozen": lambda: Net(
        lambda m, X: m.head(m.mix(torch.tanh(X).reshape(-1, 2, 4)).flatten(1)),
        mix=frozen(Mix(2, 5), "shift"), head=head(20),
    ),
}  # fmt: skip
BY_RULE["its input not written to"] = lambda: Net(
    lambda m, X: m.head(m.shift(X * 1.0)), shift=Shift(8), head=head()
)
WITHOUT = {
    "called twice": lambda: Net(
        lambda m, X: m.head(m.gain(m.gain(X) / 4)), gain=Gain(8), head=head()
    ),
    "tied to another": lambda: Net(
        lambda m, X: m.head(m.a(X / 4) + m.b(X / 4)), head=head(), **same_weight(Gain(8), Gain(8))
    ),
    "read elsewhere": lambda: Net(
        lambda m, X: m.head(m.gain(X)) * m.gain.weight.sum(), gain=Gain(8), head=head()
    ),
    "its input written to": lambda: Net(
        lambda m, X: (lambda h: (m.head(m.shift(h)), h.mul_(2))[0])(X * 1.0),
        shift=Shift(8), head=head(),
    ),
    "a subclass": lambda: Net(
        lambda m, X: m.head(m.gain(X)), gain=type("Sub", (Gain,), {})(8), head=head()
    ),
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["none", "tensor", "entry"])
@pytest.mark.parametrize("name", [*BY_RULE, *WITHOUT])
def test_value_and_gradient(name, scheme, monkeypatch):
    monkeypatch.setattr(
        "hesstrace_cli.curvature.per_example.by_example.output_layer", lambda *_: {}
    )
    objective, X, y = build({**BY_RULE, **WITHOUT}[name])
    draws, form = Draws(scheme=scheme, keep_prob=0.6), ByExample()
    (value,) = form.samples(
        forward(objective, X), objective.params, objective.task, y, draws=draws,
        generator=generator(),
    )  # fmt: skip
    users = {n for n, way in form.ways.items() if way.operation.startswith(("layer", "operation"))}
    expected = {n for n in form.ways if not n.startswith(("a.", "head."))}
    assert users == (expected if name in BY_RULE else set())
    draw = generator()
    keep = draws.keep(objective.params, draw)
    outputs = truthful(objective, X)
    signs = draw_signs(outputs, draw, balanced=True)
    whole = [name for name, way in form.ways.items() if way.kind == "batch"]
    truth = per_example_truth(outputs, objective, y, keep, signs, whole)
    assert_same(value, truth, objective.params)


@pytest.mark.parametrize("name", [*BY_RULE, *WITHOUT])
def test_exact_traces(name):
    objective, X, y = build({**BY_RULE, **WITHOUT}[name])
    refuse_wrong_rules(objective, X)
    traces = PerExampleTrace(objective, X)
    assert not traces.without_rule() or name in WITHOUT
    torch.testing.assert_close(
        traces.exact(X, y), truth_of(objective, X), rtol=1e-9, atol=1e-12
    )  # fmt: skip


def ruled(rule):
    kind = type("Wrong", (Gain,), {})
    norm_rule(kind)(rule)
    return Net(lambda m, X: m.head(m.gain(m.a(X))), a=head(), gain=kind(3), head=head(3))


WRONG = {
    "a factor": (
        lambda layer, g, x: {"weight": 2 * of_gain(layer, g, x)["weight"]},
        "rule of layer Wrong, value is wrong .*'gain.weight'",
    ),
    "examples swapped": (
        lambda layer, g, x: {"weight": of_gain(layer, g, x)["weight"].flip(0)},
        "rule of layer Wrong, value is wrong",
    ),
    "detached": (
        lambda layer, g, x: of_gain(layer, g, x.detach()),
        "rule of layer Wrong, gradient is wrong .*'a.weight'",
    ),
    "nothing": (lambda layer, g, x: {}, "gives nothing for 'weight'"),
    "the whole batch's": (
        lambda layer, g, x: {"weight": of_gain(layer, g, x)["weight"].sum(0)},
        r"gives \(3,\) for 'weight', expected a gradient for each row, \(R, 3\)",
    ),
    "wrong outer products": (
        lambda layer, g, x: {"weight": OuterProducts(g[:, None], x[:, None])},
        "outer products of 3 by 3 numbers for 'weight', expected 3",
    ),
    "an error": (lambda layer, g, x: {"weight": g @ x}, "rule of layer Wrong is refused"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_named(name):
    rule, message = WRONG[name]
    objective, X, _ = build(lambda: ruled(rule))
    before = {n: p.detach().clone() for n, p in objective.params.items()}
    with pytest.raises(DerivativeError, match=message):
        refuse_wrong_rules(objective, X)
    assert all(torch.equal(p, before[n]) for n, p in objective.params.items())


def test_what_is_no_class_is_refused():
    for thing in (of_gain, Gain(3), int):
        with pytest.raises(ModelError, match="expected a class of layers"):
            norm_rule(thing)


FILE = """
import torch
from torch import nn
from hesstrace_cli.curvature.per_example.registry import norm_rule


class Gain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.weight.exp()


@norm_rule(Gain)
def of_gain(layer, g, x):
    return {"weight": g * x}


def build(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Gain(), nn.Linear(8, num_classes))
"""


def test_verify_train_and_estimate_tell(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    model = ("--model", f"{tmp_path}/mine.py:build")
    result = invoke("verify", *model)
    assert result.exit_code == 5
    assert "norm rule of layer Gain, value" in result.output
    flags = (*model, "--epochs", "1", "--train-examples", "40", "--reg", "trace")
    result = invoke("train", *flags, "--form", "example", "--out", tmp_path / "a")
    assert result.exit_code == 4
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: norm rule of layer Gain, value is wrong")
    assert invoke("train", *flags, "--form", "batch", "--out", tmp_path / "b").exit_code == 0
    result = invoke("estimate-trace", tmp_path / "b" / "last.pt", *model)
    assert result.exit_code == 4
    assert "norm rule of layer Gain, value is wrong" in result.stderr


def test_no_hook_is_left_on_others_modules():
    """A rule that is registered is no matter of a loop that does not differentiate here."""
    assert not torch.nn.modules.module._has_any_global_hook()
