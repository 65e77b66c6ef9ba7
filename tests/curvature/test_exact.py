"""Per-example gradient norms, tr(G) from them, and where tr(H) = tr(G), against dense matrices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hesstrace_cli.autodiff.calls import native_outputs, trainable
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.independence import MixedExamples
from hesstrace_cli.curvature.per_example.linearity import why_not_linear
from hesstrace_cli.curvature.per_example.rules import chunks
from hesstrace_cli.curvature.trace import exact
from hesstrace_cli.curvature.trace.exact import PerExampleTrace, hessian_diagonal_traces
from tests.curvature import oracles
from tests.curvature.zoo import CASES, make


class Function(nn.Module):
    """A network as a function of its own parameters and the inputs (N, 8)."""

    def __init__(self, function, **params):
        super().__init__()
        self.function = function
        for name, shape in params.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.5))

    def forward(self, X):
        return self.function(self, X)


def module(*layers):
    return lambda: nn.Sequential(*[layer() for layer in layers])


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Sequence(nn.Module):
    """A recurrent layer on sequences of two or more words, time first."""

    def __init__(self, layer, head):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(4, 3), layer, head

    def forward(self, X):
        return self.head(self.layer(self.table(words(X).T))[0].mean(0))


class Cell(nn.Module):
    """A cell, step by step."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, X):
        state, steps = None, []
        for x in X:
            state = self.cell(x, state)
            steps.append(state[0])
        return torch.stack(steps), state


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, X):
        return self.head(F.relu(self.inner(X[:, :4])) + F.relu(self.inner(X[:, 4:])))


class TwiceInARow(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, X):
        return self.head(F.relu(self.inner(F.relu(self.inner(X)))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.c = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(2, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, X):
        X = X.reshape(-1, 2, 2, 2)
        inner = self.b(F.relu(self.norm(self.a(X)))) + self.c(X)
        return self.head(F.max_pool2d(F.relu(inner), 2).flatten(1))


def words(X):
    return (X[:, :5] * 2).long().abs() % 4


PIECEWISE_LINEAR = {
    "linear": module(lambda: nn.Linear(8, 3)),
    "relu": CASES["relu"],
    "leaky, hardtanh, prelu": module(
        lambda: nn.Linear(8, 6), nn.LeakyReLU, lambda: nn.Linear(6, 6), nn.Hardtanh,
        lambda: nn.Linear(6, 6), nn.PReLU, lambda: nn.Linear(6, 3),
    ),
    "residual, batch norm in eval mode, max-pool, groups": Residual,
    "a weight used twice, side by side": Siamese,
    "two weights multiplied": lambda: Function(
        lambda m, X: (X @ m.a) * (X @ m.b), a=(8, 3), b=(8, 3)
    ),
    "embedding": lambda: Function(
        lambda m, X: F.relu(F.embedding(words(X), m.table)).mean(1) @ m.head,
        table=(4, 6), head=(6, 3),
    ),
    "upsampled, padded": lambda: Function(
        lambda m, X: F.relu(F.conv2d(
            F.interpolate(F.pad(X.reshape(-1, 2, 2, 2), (1, 1, 0, 0)), scale_factor=2), m.kernel,
        )).amax((2, 3)) @ m.head,
        kernel=(4, 2, 2, 2), head=(4, 3),
    ),
    "checkpointed": lambda: Function(
        lambda m, X: F.relu(checkpoint(torch.matmul, X, m.a, use_reentrant=False)) @ m.head,
        a=(8, 6), head=(6, 3),
    ),
    "divided by a constant": lambda: Function(lambda m, X: (X @ m.a) / X.norm(), a=(8, 3)),
    "complex numbers": lambda: Function(
        lambda m, X: (
            torch.fft.ifft(torch.fft.fft(X @ m.a) * torch.complex(m.b, m.c)).conj().imag @ m.head
        ),
        a=(8, 6), b=(6,), c=(6,), head=(6, 3),
    ),
    "rotated by constants": lambda: Function(
        lambda m, X: torch.view_as_real(
            torch.view_as_complex((X @ m.a).reshape(-1, 3, 2)) * torch.exp(1j * X[:, :3])
        ).sum(2),
        a=(8, 6),
    ),
}  # fmt: skip

TURNED_DOWN = {
    "functional gelu": (lambda: Function(lambda m, X: F.gelu(X @ m.a), a=(8, 3)), "Gelu"),
    "tied, in a row": (TwiceInARow, "used twice"),
    "squared": (
        lambda: Function(lambda m, X: (X @ m.a).square() * m.b, a=(8, 3), b=(3,)), "Pow",
    ),
    "times itself": (
        lambda: Function(lambda m, X: (X @ m.a) * (X @ m.a) * m.b, a=(8, 3), b=(3,)), "used twice",
    ),
    "divided by itself": (
        lambda: Function(lambda m, X: (X @ m.a) / (X @ m.a).abs().sum(), a=(8, 3)), "divides",
    ),
    "functional layer norm": (
        lambda: Function(lambda m, X: F.layer_norm(X @ m.a, (3,)), a=(8, 3)), "LayerNorm",
    ),
    "batch statistics": (
        lambda: Function(lambda m, X: F.batch_norm(X @ m.a, None, None, training=True), a=(8, 3)),
        "batch",
    ),
    "recurrent": (CASES["lstm"], "not known"),
    **{
        f"{name} of a complex number": (
            lambda function=function: Function(
                lambda m, X: function(torch.fft.rfft(X @ m.a)) @ m.head, a=(8, 6), head=(4, 3)
            ),
            node,
        )
        for name, function, node in (
            ("abs", torch.abs, "'Abs' of a complex number"),
            ("sign", lambda z: torch.sgn(z).real, "Sgn"),
            ("square", lambda z: (z * z).real, "used twice"),
            ("squared size", lambda z: (z * z.conj()).real, "used twice"),
            ("norm", lambda z: torch.linalg.vector_norm(z[..., None], dim=-1), "VectorNorm"),
        )
    },
    "attention": (CASES["attention"], "not known"),
    "weight norm": (CASES["weight_norm"], "not known"),
}  # fmt: skip
TURNED_DOWN_IN_VAIN = {
    "own autograd function": (
        lambda: Function(lambda m, X: Double.apply(X @ m.a), a=(8, 3)), "Double",
    ),
}  # fmt: skip


def build(case, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = case().double().eval()
        X, y = torch.randn(6, 8, dtype=torch.float64), torch.randint(0, 3, (6,))
        for each in model.modules():
            if getattr(each, "running_mean", None) is not None:
                each.running_mean.normal_(0, 0.3)
                each.running_var.uniform_(0.5, 2)
    return Objective(model, trainable(model)), X, y


def why(objective, X):
    return why_not_linear(native_outputs(objective.model, X), objective.params)


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_traces_are_equal_where_the_logits_are_piecewise_linear(name):
    objective, X, y = build(PIECEWISE_LINEAR[name])
    assert why(objective, X) is None
    H, G = oracles.dense_hessian(objective, X, y), oracles.dense_ggn(objective, X)
    assert not torch.allclose(H, G) or name in (
        "linear", "divided by a constant", "rotated by constants"
    )  # fmt: skip
    torch.testing.assert_close(H.diagonal(), G.diagonal(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", TURNED_DOWN)
def test_others_are_turned_down_and_rightly(name):
    case, reason = TURNED_DOWN[name]
    objective, X, y = build(case)
    assert reason in why(objective, X)
    if name not in ("attention", "weight norm"):  # these have no dense oracle in PyTorch
        H, G = oracles.dense_hessian(objective, X, y), oracles.dense_ggn(objective, X)
        assert abs(H.trace() - G.trace()) > 1e-6


@pytest.mark.parametrize("name", TURNED_DOWN_IN_VAIN)
def test_what_is_not_known_is_turned_down(name):
    case, reason = TURNED_DOWN_IN_VAIN[name]
    objective, X, _ = build(case)
    assert reason in why(objective, X.requires_grad_())


def test_a_frozen_weight_may_be_used_twice():
    objective, X, _ = build(TwiceInARow)
    objective.model.inner.requires_grad_(False)
    assert why(Objective(objective.model, trainable(objective.model)), X) is None


def test_batch_norm_in_train_mode_is_turned_down():
    objective, X, _ = build(Residual)
    objective.model.train()
    assert "statistics from the batch" in why(objective, X)
    with pytest.raises(MixedExamples):
        PerExampleTrace(objective, X)


class Clamp(torch.autograd.Function):
    """A smooth function under the name of an operation that is piecewise linear."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh().square())


def test_a_users_function_is_not_believed_its_name():
    objective, X, _ = build(lambda: Function(lambda m, X: Clamp.apply(X @ m.a), a=(8, 3)))
    assert "autograd.Function Clamp" in why(objective, X)


@pytest.mark.parametrize("kind", [float, int])
def test_mixing_through_a_layer_used_twice_is_found(kind):
    def mixed(m, X):
        hidden = F.linear(X.double(), m.a)
        return F.relu(hidden) @ m.b + F.linear(X.double(), m.a).mean(0) @ m.b

    objective, X, _ = build(lambda: Function(mixed, a=(4, 8), b=(4, 3)))
    X = X if kind is float else (3 * X).long()
    with pytest.raises(MixedExamples):
        PerExampleTrace(objective, X)


@pytest.mark.parametrize("examples", [1, 2, 3, 6])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_prelu_for_any_number_of_examples_and_classes(examples, classes):
    """vmap of vmap differentiates prelu wrongly where the two sizes agree."""
    objective, X, y = build(
        module(lambda: nn.Linear(8, 5), nn.PReLU, lambda: nn.Linear(5, classes))
    )
    X, y = X[:examples], y[:examples] % classes
    traces = PerExampleTrace(objective, X)
    assert traces.without_rule() == ["1.weight"]
    torch.testing.assert_close(traces.exact(X, y), truth_of(objective, X), rtol=1e-9, atol=1e-12)


def folded(m, X):
    """A convolution with the time folded into its batch, (N T, C, H, W)."""
    frames = F.conv2d(X.reshape(-1, 1, 2, 2), m.kernel, m.bias)
    return frames.reshape(len(X), -1) @ m.head


def sequence_first(m, X):
    steps = X.reshape(-1, 4, 2).transpose(0, 1)  # (L, N, E)
    hidden = F.layer_norm(torch.tanh(F.linear(steps, m.a, m.b)), (3,), m.scale, m.shift)
    return F.linear(hidden, m.head)[-1] * m.factor


def frozen(case, *names):
    """The case with some of its parameters frozen."""

    def made():
        model = case()
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        return model

    return made


SHAPES = {
    **{name: case for name, case in CASES.items() if name != "instance_norm"},
    "residual, groups, a kernel of one": Residual,
    "used twice, side by side": Siamese,
    "used twice, in a row": TwiceInARow,
    "a frozen weight, its bias free": frozen(CASES["layer_norm"], "0.weight", "1.weight"),
    "a frozen bias, its weight free": frozen(CASES["group_norm"], "0.bias", "1.bias"),
    "frozen between": frozen(CASES["depthwise"], "2.weight", "3.bias"),
    **{
        f"conv2d, {name}": lambda settings=settings, kernel=kernel: Function(
            lambda m, X: torch.tanh(F.conv2d(
                F.pad(X.reshape(-1, 2, 2, 2), (1, 2, 2, 1)), m.kernel, m.bias, **settings
            )).flatten(2).mean(2) @ m.head,
            kernel=kernel, bias=(4,), head=(4, 3),
        )
        for name, settings, kernel in (
            ("stride", {"stride": (2, 1), "padding": (0, 1)}, (4, 2, 2, 3)),
            ("dilation", {"dilation": (1, 2)}, (4, 2, 3, 2)),
            ("groups", {"groups": 2, "stride": 2, "dilation": 2, "padding": 1}, (4, 1, 2, 2)),
        )
    },
    "sequence first": lambda: Function(
        sequence_first, a=(3, 2), b=(3,), scale=(3,), shift=(3,), head=(3, 3), factor=()
    ),
    "sequence last read at its start": lambda: Function(
        lambda m, X: F.linear(torch.tanh(F.linear(X.reshape(-1, 4, 2), m.a)), m.head)[:, 0],
        a=(3, 2), head=(3, 3),
    ),
    "time folded into the batch": lambda: Function(
        folded, kernel=(2, 1, 2, 1), bias=(2,), head=(8, 3)
    ),
    "conv1d, stride, dilation": lambda: Function(
        lambda m, X: F.conv1d(
            X.reshape(-1, 2, 4), m.kernel, m.bias, stride=2, padding=1, dilation=2
        ).mean(2),
        kernel=(3, 2, 2), bias=(3,),
    ),
    "conv3d": lambda: Function(
        lambda m, X: F.conv3d(X.reshape(-1, 1, 2, 2, 2), m.kernel).flatten(1) @ m.head,
        kernel=(2, 1, 2, 2, 2), head=(2, 3),
    ),
    "conv_transpose, groups": lambda: Function(
        lambda m, X: F.conv_transpose2d(
            X.reshape(-1, 4, 2, 1), m.kernel, m.bias, stride=2, padding=1, groups=2
        ).flatten(2).mean(2) @ m.head,
        kernel=(4, 2, 3, 4), bias=(4,), head=(4, 3),
    ),
    **{
        f"conv_transpose, output padding {name}": lambda settings=settings: Function(
            lambda m, X: torch.tanh(F.conv_transpose2d(
                X.reshape(-1, 2, 2, 2), m.kernel, m.bias, **settings
            )).flatten(2).mean(2) @ m.head,
            kernel=(2, 3, 2, 2), bias=(3,), head=(3, 3),
        )
        for name, settings in {
            "below the stride": {"stride": 2, "output_padding": 1},
            "on one side": {"stride": (2, 1), "output_padding": (1, 0)},
            "below the dilation": {"dilation": 2, "output_padding": 1, "padding": 1},
            "below both": {"stride": 3, "dilation": 2, "output_padding": 2, "padding": 2},
        }.items()
    },
    "conv_transpose1d, output padding": lambda: Function(
        lambda m, X: torch.tanh(F.conv_transpose1d(
            X.reshape(-1, 2, 4), m.kernel, m.bias, dilation=3, output_padding=2, padding=1
        )).mean(2) @ m.head,
        kernel=(2, 3, 2), bias=(3,), head=(3, 3),
    ),
    **{
        f"layer norm with {name}": lambda name=name: Function(
            lambda m, X: F.layer_norm(
                torch.tanh(X @ m.a), (4,), **{name: m.own}
            ) @ m.head,
            a=(8, 4), own=(4,), head=(4, 3),
        )
        for name in ("weight", "bias")
    },
    "checkpointed": lambda: Function(
        lambda m, X: torch.tanh(checkpoint(
            lambda x: F.layer_norm(x, (4,), m.weight, m.bias) @ m.b, X @ m.a, use_reentrant=False,
        )) @ m.head,
        a=(8, 4), weight=(4,), bias=(4,), b=(4, 4), head=(4, 3),
    ),
    "embedding with padding": lambda: Function(
        lambda m, X: torch.tanh(F.embedding(words(X), m.table, padding_idx=0)).sum(1) @ m.head,
        table=(4, 6), head=(6, 3),
    ),
    "tokens and positions": lambda: Function(
        lambda m, X: F.layer_norm(
            torch.cat([m.token.expand(len(X), 1, 2), X.reshape(-1, 4, 2)], 1) + m.position, (5, 2),
        ).flatten(1) @ m.head,
        token=(1, 1, 2), position=(1, 5, 2), head=(10, 3),
    ),
    "real weights among complex numbers": lambda: Function(
        lambda m, X: (torch.fft.fft(X @ m.a) * m.gain + m.shift).abs() @ m.head,
        a=(8, 6), gain=(6,), shift=(6,), head=(6, 3),
    ),
    "lstm, two layers both ways, sequence first": lambda: Sequence(
        nn.LSTM(3, 4, num_layers=2, bidirectional=True), nn.Linear(8, 3)
    ),
    "lstm cell, no bias": lambda: Sequence(Cell(nn.LSTMCell(3, 4, bias=False)), nn.Linear(4, 3)),
    "gru, two layers": lambda: Sequence(nn.GRU(3, 4, num_layers=2), nn.Linear(4, 3)),
    "rnn": lambda: Sequence(nn.RNN(3, 4), nn.Linear(4, 3)),
    "a weight and its transpose": lambda: Function(
        lambda m, X: torch.tanh(F.linear(torch.tanh(X @ m.a), m.a, m.b)) @ m.head,
        a=(8, 4), b=(8,), head=(8, 3),
    ),
    "a square weight and its transpose": lambda: Function(
        lambda m, X: F.linear(torch.tanh(X.reshape(-1, 2, 4) @ m.a), m.a).flatten(1) @ m.head,
        a=(4, 4), head=(8, 3),
    ),
    "words and outputs that share a table": lambda: Function(
        lambda m, X: F.linear(F.embedding(words(X), m.table).cumsum(1).tanh(), m.table, m.b)
        .flatten(1) @ m.head, table=(4, 6), b=(4,), head=(20, 3),
    ),
    "two tables that are one, padded": lambda: Function(
        lambda m, X: (
            F.embedding(words(X), m.table, padding_idx=0) + F.embedding(words(-X), m.table)
        ).tanh().sum(1) @ m.head,
        table=(4, 6), head=(6, 3),
    ),
    "convolved twice": lambda: Function(
        lambda m, X: F.conv1d(F.conv1d(X.reshape(-1, 1, 8), m.a).tanh(), m.a).flatten(1),
        a=(1, 1, 4),
    ),
    "whole weights inside and out": lambda: Function(
        lambda m, X: torch.mm(X, m.a) * m.row - m.row2 + (m.b * 2) @ m.c,
        a=(8, 3), row=(3,), row2=(1, 3), b=(1, 2), c=(2, 3),
    ),
}  # fmt: skip


def truth_of(objective, X):
    sizes = [p.numel() for p in objective.params.values()]
    per_example = [oracles.dense_ggn(objective, x[None]).diagonal() for x in X]
    return torch.stack([torch.stack([b.sum() for b in d.split(sizes)]) for d in per_example])


@pytest.mark.parametrize("chunk", [1, chunks.CHUNK])
@pytest.mark.parametrize("name", SHAPES)
def test_every_example_has_its_dense_trace(name, chunk, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    objective, X, y = build(SHAPES[name])
    truth = truth_of(objective, X)
    traces = PerExampleTrace(objective, X)
    torch.testing.assert_close(traces.exact(X, y), truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(traces.exact(X[:1], y[:1]), truth[:1], rtol=1e-9, atol=1e-12)


def test_examples_worked_on_at_once_make_no_difference(monkeypatch):
    objective, X, y = build(CASES["transformer"])
    whole = PerExampleTrace(objective, X)
    monkeypatch.setattr(exact, "ACTIVATIONS", 1)
    parts = PerExampleTrace(objective, X)
    torch.testing.assert_close(parts.exact(X, y), whole.exact(X, y))
    generator = torch.Generator()
    for traces in (whole, parts):
        samples = traces.sample(X, y, 2, generator.manual_seed(0))
        assert samples.shape == (2, 6, len(objective.params))


def test_rules_are_used_where_there_are_some():
    """What is left to differentiation example by example is known."""
    left = {
        name: PerExampleTrace(*build(SHAPES[name])[:2]).without_rule()
        for name in ("batch_norm_2d", "layer_norm", "group_norm", "transformer", "depthwise",
                     "embedding", "sequence first", "time folded into the batch", "tied", "conv3d",
                     "lstm", "lstm cell, no bias", "gru, two layers", "convolved twice",
                     "words and outputs that share a table", "a weight and its transpose")
    }  # fmt: skip
    assert {name: names for name, names in left.items() if names} == {
        "convolved twice": ["a"],
    }


def test_signs_are_unbiased():
    objective, X, y = build(CASES["transformer"])
    traces = PerExampleTrace(objective, X)
    samples = traces.sample(X, y, 3000, torch.Generator().manual_seed(0))
    truth = traces.exact(X, y)
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - truth).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, "transposed"])
@pytest.mark.parametrize("name", ["gelu", "tied", "lstm", "max_pool"])
def test_whole_diagonal(name, layout):
    model, X, y = make(name, train=False)
    for p in model.parameters():
        if layout == "transposed":
            p.data = p.data.mT.contiguous().mT if p.dim() > 1 else p.data
        elif p.dim() == 4:
            p.data = p.data.contiguous(memory_format=layout)
    objective = Objective(model, trainable(model))
    H = oracles.dense_hessian(objective, X, y)
    blocks = H.diagonal().split([p.numel() for p in objective.params.values()])
    truth = torch.stack([block.sum() for block in blocks])
    torch.testing.assert_close(hessian_diagonal_traces(objective, X, y), truth)


@pytest.mark.parametrize("name", ["gelu", "layer_norm", "tied"])
def test_residual_is_the_difference(name):
    model, X, y = make(name, train=False)
    objective = Objective(model, trainable(model))
    residual = Objective(model, objective.params)
    difference = oracles.dense_hessian(objective, X, y) - oracles.dense_ggn(objective, X)
    grad = torch.autograd.grad(
        objective.residual(objective.params, X, y), list(objective.params.values()),
        create_graph=True,
    )  # fmt: skip
    flat = torch.cat([g.flatten() for g in grad])
    rows = [
        torch.cat([
            r.flatten() for r in torch.autograd.grad(
                g, list(residual.params.values()), retain_graph=True, materialize_grads=True
            )
        ])
        for g in flat
    ]  # fmt: skip
    torch.testing.assert_close(torch.stack(rows), difference, rtol=1e-9, atol=1e-10)
