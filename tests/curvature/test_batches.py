"""What is decided on a few examples holds for all of them, or is decided anew."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.independence import MixedExamples
from hesstrace_cli.curvature.trace.exact import PerExampleTrace
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.errors import ConfigError
from tests.curvature import oracles
from tests.curvature.test_exact import Function

BATCH = 8


def data(X):
    return TensorSplit(X, torch.arange(len(X)) % 3, Preprocess(), torch.float64)


def normal(n=24, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def build(function, **params):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Function(function, **params).double()


def truth_of(model, split, batch_size=BATCH):
    objective = Objective(model, trainable(model))
    return sum(
        oracles.dense_hessian(objective, X, y).trace().item() * len(X) / len(split)
        for X, y in split.batches(batch_size)
    )


def some_curved(m, X):
    """A branch that only some examples take."""
    rows = [F.gelu(x @ m.a) if x[0] > 1.2 else F.relu(x @ m.a) for x in X]
    return torch.stack(rows) @ m.head


def curved_batch(m, X):
    hidden = X @ m.a
    return (hidden.square() if X.abs().max() > 5 else F.relu(hidden)) @ m.head


def calm_then(change):
    """Inputs whose first batch is tame."""
    X = normal()
    X[:BATCH] = X[:BATCH].clamp(-1, 1)
    change(X[BATCH:])
    return X


BRANCHES = {
    "an example's": (some_curved, calm_then(lambda X: X[::3, 0].fill_(2))),
    "a batch's": (curved_batch, calm_then(lambda X: X[10].mul_(9))),
}


@pytest.mark.parametrize("width", [10, 60])  # fewer and more weights than have a whole diagonal
@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_that_other_batches_take_changes_the_method(name, width):
    function, X = BRANCHES[name]
    model, split = build(function, a=(8, width), head=(width, 3)), data(X)
    objective = Objective(model, trainable(model))
    assert PerExampleTrace(objective, X[:BATCH], linear=True)
    truth = truth_of(model, split)
    got = estimate(model, split, EstimateConfig(batch_size=BATCH, rtol=0.01))
    total = got.result.total
    assert "in batch" in got.reason
    if width == 10:
        assert got.method == "exact"
        assert total.value == pytest.approx(truth, rel=1e-9)
    else:
        assert got.method in ("exact+hutchinson", "hutchinson")
        assert abs(total.value - truth) < 4 * total.stderr
        with pytest.raises(ConfigError, match="in batch"):
            estimate(model, split, EstimateConfig(batch_size=BATCH, method="exact"))


def lengths(X):
    return ((X[:, 0].abs() * 10).long() % 4 + 1).clamp(max=4)


def packed(m, X):
    """Rows of all the steps that count, time first, as recurrent layers take them."""
    steps = pack_padded_sequence(
        X.reshape(-1, 4, 2), lengths(X), batch_first=True, enforce_sorted=False
    )
    hidden = steps._replace(data=torch.tanh(F.linear(steps.data, m.a, m.b)))
    return pad_packed_sequence(hidden, batch_first=True, total_length=4)[0].sum(1) @ m.head


def masked(m, X):
    """The same rows, example first, by a mask."""
    mask = torch.arange(4) < lengths(X)[:, None]
    rows = torch.tanh(F.linear(X.reshape(-1, 4, 2)[mask], m.a, m.b))
    padded = torch.zeros(*mask.shape, rows.shape[1], dtype=X.dtype)
    return padded.masked_scatter(mask[..., None], rows).sum(1) @ m.head


def of_lengths(*numbers):
    """Inputs whose sequences have these lengths."""
    X = normal(len(numbers))
    X[:, 0] = (torch.tensor(numbers) - 1) / 10 + 0.05
    assert lengths(X).tolist() == list(numbers)
    return X


FIRST = [2] * BATCH
LATER = {
    "others": [1, 2, 3, 4, 1, 2, 3, 3],
    "others, as many rows": [1, 3, 2, 2, 4, 1, 1, 2],
    "two exchanged": [2, 2, 2, 1, 3, 2, 2, 2],
    "as many for all": [3] * BATCH,
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("function", [packed, masked])
def test_sequences_of_other_lengths(function, name):
    model = build(function, a=(20, 2), b=(20,), head=(20, 3))
    X, y = of_lengths(*FIRST, *LATER[name]), torch.zeros(2 * BATCH, dtype=torch.int64)
    traces = PerExampleTrace(Objective(model, trainable(model)), X[:BATCH])
    truth = torch.stack([
        oracles.dense_ggn(traces.objective, x[None]).diagonal().sum() for x in X
    ])  # fmt: skip
    for part in (slice(0, BATCH), slice(BATCH, None)):
        got = traces.exact(X[part], y[part], number=part.start)
        torch.testing.assert_close(got.sum(1), truth[part], rtol=1e-9, atol=1e-12)
        again = traces.exact(X[part], y[part], number=part.start)
        torch.testing.assert_close(again, got)


def test_rows_that_are_as_many_as_the_examples_but_not_theirs():
    """Positions, of which there are as many as examples: in a later batch, too."""

    def function(m, X):
        positions = torch.tanh(torch.eye(X.shape[1], dtype=X.dtype) @ m.position) @ m.mix
        return (torch.tanh(X @ m.a)[:, None] * positions).sum(1) @ m.head

    model = build(function, a=(8, 5), position=(8, 4), mix=(4, 5), head=(5, 3))
    for first in (8, 6):
        X = normal(first + 8)
        traces = PerExampleTrace(Objective(model, trainable(model)), X[:first])
        assert {"position", "mix"} <= set(traces.without_rule())
        truth = [oracles.dense_ggn(traces.objective, x[None]).trace() for x in X[first:]]
        torch.testing.assert_close(
            traces.exact(X[first:], torch.zeros(8, dtype=torch.int64)).sum(1), torch.stack(truth)
        )


def groups(m, X, size):
    hidden = torch.tanh(X @ m.a).reshape(-1, size, m.a.shape[1])
    return ((hidden - hidden.mean(1, keepdim=True)).reshape(len(X), -1)) @ m.head


MIXED = {
    "above the batch's mean": lambda m, X: (lambda h: (h * (h > h.mean())) @ m.head)(X @ m.a),
    "above the median": lambda m, X: (lambda h: (h * (h > h.median(0)[0])) @ m.head)(X @ m.a),
    "over the largest": lambda m, X: (
        lambda h: h / h.abs().max().detach() @ m.head
    )(X @ m.a),
    "over the largest input": lambda m, X: ((X / X.abs().max()) @ m.a) @ m.head,
    "the largest few of the batch": lambda m, X: (
        lambda h: (h * (h >= h.flatten().topk(12)[0][-1])) @ m.head
    )(X @ m.a),
    "its rank in the batch": lambda m, X: (
        X @ m.a * X[:, :1].argsort(0).argsort(0).to(X.dtype)
    ) @ m.head,
    "quantized by the batch's scale": lambda m, X: (
        lambda h, s: (h / s).round() * s @ m.head + h @ m.head
    )(X @ m.a, (X @ m.a).abs().max().item() / 7),
    "pairs of neighbours": lambda m, X: groups(m, X, 2) if len(X) % 2 == 0 else X @ m.a @ m.head,
    "ghost batches of four": lambda m, X: (
        groups(m, X, 4) if len(X) % 4 == 0 else X @ m.a @ m.head
    ),
    "the next example": lambda m, X: (X @ m.a + X.roll(1, 0) @ m.a) @ m.head,
    "its place in the batch": lambda m, X: (
        X @ m.a * torch.arange(len(X), dtype=X.dtype)[:, None]
    ) @ m.head,
    "how many there are": lambda m, X: (X @ m.a) / len(X) @ m.head,
    "statistics of rounded inputs": lambda m, X: (
        F.one_hot((X * 2).long().clamp(-2, 2) + 2, 5).to(X.dtype).flatten(1)
        - F.one_hot((X * 2).long().clamp(-2, 2) + 2, 5).to(X.dtype).flatten(1).mean(0)
    ) @ m.table @ m.head,
    "batch statistics": lambda m, X: F.batch_norm(X @ m.a, None, None, training=True) @ m.head,
    "the first example": lambda m, X: (X @ m.a - (X @ m.a)[:1].detach()) @ m.head,
    "no single example": lambda m, X: (X @ m.a).reshape(len(X) // 2, -1).reshape(len(X), -1)
    @ m.head,
}  # fmt: skip
PARAMS = {"a": (8, 6), "table": (40, 6), "head": (6, 3)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MIXED)
def test_examples_that_touch_each_other_are_found(name, seed):
    model = build(MIXED[name], **PARAMS)
    with pytest.raises(MixedExamples):
        PerExampleTrace(Objective(model, trainable(model)), normal(BATCH, seed=seed))


def test_examples_that_touch_each_other_in_later_batches_only():
    def function(m, X):
        hidden = X @ m.a
        largest = hidden.detach().abs().max()
        return torch.where(largest > 8, hidden / largest, hidden) @ m.head

    model = build(function, a=(8, 40), head=(40, 3))
    X = normal()
    X[BATCH:] *= 6
    assert PerExampleTrace(Objective(model, trainable(model)), X[:BATCH], linear=True)
    got = estimate(model, data(X), EstimateConfig(batch_size=BATCH))
    assert got.method == "hutchinson"
    assert "in batch" in got.reason


def sequence_first(m, X, shape):
    steps = torch.tanh(X.reshape(-1, 4, 2).transpose(0, 1) @ m.a)
    return (steps * m.gain.reshape(shape)).sum(0) @ m.head


APART = {
    **{
        f"a gain {shape}, sequence first": (
            lambda m, X, shape=shape: sequence_first(m, X, shape),
            {"a": (2, 5), "gain": size, "head": (5, 3)},
        )
        for shape, size in (
            ((5,), (5,)), ((1, 5), (5,)), ((1, 1, 5), (1, 1, 5)), ((4, 1, 5), (4, 1, 5)),
            ((4, 1, 1), (4, 1, 1)), ((1, 1, 1), ()),
        )
    },
    "a layer on (H, N, W, C)": (
        lambda m, X: torch.tanh(F.linear(
            X.reshape(-1, 2, 2, 2).transpose(0, 1), m.a, m.b
        )).sum((0, 2)) @ m.head,
        {"a": (5, 2), "b": (5,), "head": (5, 3)},
    ),
    "a gain on (H, N, W, C)": (
        lambda m, X: (torch.tanh(X.reshape(-1, 2, 2, 2).transpose(0, 1)) * m.gain).sum((0, 2))
        @ m.head,
        {"gain": (2,), "head": (2, 3)},
    ),
    "a layer on (H, W, N, C)": (
        lambda m, X: torch.tanh(F.linear(
            X.reshape(-1, 2, 2, 2).permute(1, 2, 0, 3), m.a, m.b
        )).sum((0, 1)) @ m.head,
        {"a": (5, 2), "b": (5,), "head": (5, 3)},
    ),
    "weights made for every example": (
        lambda m, X: torch.bmm(X[:, None], F.linear(X, m.a, m.b).reshape(-1, 8, 3))[:, 0],
        {"a": (24, 8), "b": (24,)},
    ),
    "weights made from an embedding of the layer": (
        lambda m, X: X @ torch.tanh(F.linear(m.code, m.a, m.b)).reshape(8, 3),
        {"code": (8, 2), "a": (3, 2), "b": (3,)},
    ),
    "convolved with kernels made for every example": (
        lambda m, X: F.conv2d(
            X.reshape(1, -1, 2, 2), F.linear(X, m.a).reshape(-1, 1, 2, 2), groups=2 * len(X)
        ).reshape(len(X), -1) @ m.head,
        {"a": (16, 8), "head": (4, 3)},
    ),
    "a root at 0": (
        lambda m, X: torch.sqrt((X - X.amin(1, keepdim=True)).round()) @ m.head + X @ m.a,
        {"a": (8, 3), "head": (8, 3)},
    ),
    "a root at 0 of inputs": (
        lambda m, X: torch.sqrt(X - X.amin(1, keepdim=True)) @ m.head, {"head": (8, 3)},
    ),
    "a norm at 0": (
        lambda m, X: F.relu(X @ m.a)
        * torch.linalg.vector_norm(X - X, dim=1, keepdim=True).exp() @ m.head,
        {"a": (8, 6), "head": (6, 3)},
    ),
    "rounded inputs": (
        lambda m, X: F.embedding((X.abs() * 3).long().clamp(max=5), m.table).mean(1) @ m.head,
        {"table": (6, 4), "head": (4, 3)},
    ),
    "sorted within an example": (
        lambda m, X: (X @ m.a).sort(1)[0] @ m.head, {"a": (8, 6), "head": (6, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_no_false_alarm(name):
    function, params = APART[name]
    model = build(function, **params)
    for seed, count in ((0, 8), (1, 5), (2, 2), (3, 1)):
        X = normal(count, seed=seed)
        traces = PerExampleTrace(Objective(model, trainable(model)), X)
        truth = [oracles.dense_ggn(traces.objective, x[None]).trace() for x in X]
        torch.testing.assert_close(
            traces.exact(X, torch.zeros(count, dtype=torch.int64)).sum(1), torch.stack(truth)
        )


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_on_packed_sequences(layer):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.cell, self.head = layer(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, X):
            steps = pack_padded_sequence(
                X.reshape(-1, 4, 2), lengths(X), batch_first=True, enforce_sorted=False
            )
            out = pad_packed_sequence(self.cell(steps)[0], batch_first=True, total_length=4)[0]
            return self.head(out.mean(1))

    model = Packed().double()
    split = data(of_lengths(*FIRST, 1, 2, 3, 4, 4, 4, 1, 3))
    truth = truth_of(model, split)
    for method in ("auto", "hutchinson"):
        total = estimate(
            model, split, EstimateConfig(method=method, batch_size=BATCH, rtol=0.02)
        ).result.total
        assert abs(total.value - truth) <= 4 * total.stderr + 1e-9
