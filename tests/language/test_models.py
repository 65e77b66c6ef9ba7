"""LSTM and GPT, tied and not, against dense float64; what they are in words."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from hesstrace_cli.analysis import method_choice
from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.analysis.evaluation import evaluate
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.by_example import ByExample
from hesstrace_cli.curvature.probes import Draws, draw_signs
from hesstrace_cli.errors import ModelError
from hesstrace_cli.models import build_model
from hesstrace_cli.models.language import Carrying
from hesstrace_cli.tasks import Tokens
from tests.conftest import assert_one_line_error, invoke
from tests.language.cases import SMALL, T, V, block_traces, mean_loss, model_of, numbers, text


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@pytest.mark.parametrize(
    "name", [n if "tied" in n else pytest.param(n, marks=pytest.mark.slow) for n in SMALL]
)
def test_the_exact_diagonal(name, monkeypatch):
    monkeypatch.setattr(method_choice, "MAX_DIAGONAL", 1000)
    config = EstimateConfig(method="exact", dtype="float64", batch_size=3)
    found = estimate(model_of(name), text(), config)
    for each, truth in block_traces(name, "hessian").items():
        assert found.per_layer[each] == (pytest.approx(truth, rel=1e-9, abs=1e-12), 0), each


@pytest.mark.parametrize(
    ("method", "curvature"), [("hutchinson", "hessian"), ("hutchinson", "ggn"), ("auto", "ggn")]
)
def test_the_estimated_trace(name, method, curvature):
    config = EstimateConfig(
        method=method, curvature=curvature, dtype="float64", batch_size=4, rtol=0, max_passes=12
    )
    found = estimate(model_of(name), text(), config)
    blocks = block_traces(name, curvature)
    truth = math.fsum(blocks.values())
    assert abs(found.value - truth) < 5 * found.stderr
    assert found.stderr < 0.5 * abs(truth)
    for each, (value, stderr) in found.per_layer.items():
        assert abs(value - blocks[each]) < 6 * stderr + 1e-9 * abs(truth), each


def test_the_gradient(name):
    """Of the loss that is trained on, against finite differences of the mean in words."""
    model, split = model_of(name), text()
    params = trainable(model)
    ((X, y),) = split.batches(100)
    loss = Objective(model, params, Tokens()).loss(params, X, y)
    grads = torch.autograd.grad(loss, list(params.values()))
    generator, step = torch.Generator().manual_seed(3), 1e-6
    for (each, p), grad in zip(params.items(), grads, strict=True):
        assert grad.abs().sum() > 0, each
        direction = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        high, low = (
            mean_loss(model, split, {**params, each: p.detach() + sign * step * direction}).item()
            for sign in (1, -1)
        )
        slope = (high - low) / (2 * step)
        assert (grad * direction).sum().item() == pytest.approx(slope, rel=1e-5, abs=1e-9), each


def test_an_lstm_in_words():
    """Gates written out, layer by layer and token by token, from a given state."""
    model = model_of("lstm")
    X, state = numbers(2 * T).view(2, T), torch.randn(2, 2, 2, 2, dtype=torch.float64)
    rows = [model.embedding(X[:, t]) for t in range(T)]
    ends = []
    for number, layer in enumerate(model.layers):
        h, c = state[:, 0, number], state[:, 1, number]
        for t in range(T):
            gates = F.linear(rows[t], layer.weight_ih_l0, layer.bias_ih_l0)
            gates = gates + F.linear(h, layer.weight_hh_l0, layer.bias_hh_l0)
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            rows[t] = h
        ends.append(torch.stack([h, c], 1))
    given = model(X, state=state)
    torch.testing.assert_close(given["logits"], model.decoder(torch.stack(rows, 1)))
    torch.testing.assert_close(given["state"], torch.stack(ends, 2))
    fresh = model(X, state=model.zero_state(2))["logits"]
    assert torch.equal(model(X), fresh)


def test_a_gpt_sees_what_came_before_alone():
    model = model_of("gpt")
    X = numbers(T)[None]
    other = X.clone()
    other[0, 1] = (other[0, 1] + 1) % V
    a, b = model(X), model(other)
    assert torch.equal(a[:, :1], b[:, :1])
    assert not torch.isclose(a[:, 1:], b[:, 1:]).any()
    moved = X.flip(1)
    assert not torch.isclose(model(moved).flip(1)[0, -1], model(X)[0, 0]).all()  # positions count


@pytest.mark.parametrize("spec", ["lstm", "gpt"])
def test_tied_weights_are_one(spec):
    tied, own = (
        build_model(spec, num_classes=V, in_shape=(T,), model_args={"tied": t}, seed=0)
        for t in (True, False)
    )
    assert tied.decoder.weight is tied.embedding.weight
    count = [sum(p.numel() for p in trainable(m).values()) for m in (tied, own)]
    assert count[1] - count[0] == tied.embedding.weight.numel()


def test_dropout_is_active_in_training_alone():
    for spec in ("lstm", "gpt"):
        arguments = {"dropout": 0.5, "width": 8}
        model = build_model(spec, num_classes=V, in_shape=(T,), model_args=arguments, seed=0)
        X = numbers(2 * T).view(2, T)
        assert torch.equal(model.eval()(X), model(X))
        model.train()
        assert not torch.equal(model(X), model(X))


def test_a_wrong_width():
    with pytest.raises(ModelError, match="a multiple of heads, which is 3"):
        build_model("gpt", num_classes=V, in_shape=(T,), model_args={"heads": 3}, seed=0)


READERS = """
import torch
from torch import nn
import torch.nn.functional as F

class Reader(nn.Module):
    def __init__(self, num_classes, both_ways=False, noise=0.0):
        super().__init__()
        self.table = nn.Embedding(num_classes, 4)
        self.cells = nn.GRU(4, 4, batch_first=True, bidirectional=both_ways)
        self.head = nn.Linear(8 if both_ways else 4, num_classes)
        self.noise = noise

    def forward(self, X):
        return self.head(F.dropout(self.cells(self.table(X))[0], self.noise))
"""


def test_a_model_that_reads_what_it_is_to_tell_is_refused(tmp_path):
    (tmp_path / "readers.py").write_text(READERS)
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text("a b c a d b " * 9)
    flags = ["--dataset", f"text:{tmp_path}", "--seq-len", "4", "--model", "readers.py:Reader"]
    both = [*flags, "--model-arg", "both_ways=true"]
    for command in ("train", "verify"):
        assert_one_line_error(invoke(command, *both), 4, "sees the tokens that it is to tell")
    noisy = invoke("train", *flags, "--model-arg", "noise=0.5", "--epochs", "1", "--out", "r")
    assert noisy.exit_code == 0, noisy.output  # outputs that differ by themselves are no sign of it
    assert invoke("train", *both, "--seq-len", "1", "--epochs", "1", "--out", "s").exit_code == 0


@pytest.mark.parametrize("n", [30, 31, 200])
def test_perplexity_is_of_all_tokens_whatever_the_batch(name, n):
    """exp of the mean over every token but the first, a state carried along ten streams."""
    model, split = model_of(name), text(n)
    found = [evaluate(model, split, batch_size) for batch_size in (1, 3, 64)]
    losses, right, tokens = 0.0, 0, numbers(n)
    windows = torch.arange(len(split)).tensor_split(min(10, len(split)))
    for run in windows:
        state = model.zero_state(1) if isinstance(model, Carrying) else None
        for window in run.tolist():
            begin, end = window * T, min((window + 1) * T, n - 1)
            X, y = tokens[begin:end], tokens[begin + 1 : end + 1]
            with torch.no_grad():
                given = model(X[None]) if state is None else model(X[None], state=state)
            logits, state = (given, None) if state is None else (given["logits"], given["state"])
            losses += F.cross_entropy(logits[0], y, reduction="sum").item()
            right += int((logits[0].argmax(1) == y).sum())
    for each in found:
        assert each.metrics["perplexity"] == pytest.approx(math.exp(losses / (n - 1)), rel=1e-9)
        assert each.metrics["accuracy"] == pytest.approx(right / (n - 1))
        assert each.loss == pytest.approx(losses / (n - 1), rel=1e-9)
    alone = evaluate(model, split, 3, alone=True)
    assert alone.loss == pytest.approx(mean_loss(model, split).item(), rel=1e-9)
    assert (alone.loss == pytest.approx(found[0].loss)) == (not isinstance(model, Carrying)) or (
        len(split) <= 10
    )


@pytest.mark.parametrize("weights", [None, tuple(1 + i / V for i in range(V))])
def test_the_loss_of_tokens_is_taken_once(weights, monkeypatch):
    """By the meter, unless the task weighs tokens, of which the perplexity knows nothing."""
    model, split = model_of("gpt"), text(100)
    plain = evaluate(model, split, 4)
    calls = []
    monkeypatch.setattr(F, "cross_entropy", _counted(calls))
    found = evaluate(model, split.of_task(Tokens(class_weights=weights)), 4)
    batches = -(-len(split) // 4)
    assert len(calls) == batches * (1 if weights is None else 2)
    assert found.metrics == plain.metrics
    ((X, y),) = split.batches(1000)
    of_tokens = -model(X).log_softmax(-1).gather(2, y.clamp(min=0)[..., None])[..., 0]
    w = torch.ones(V) if weights is None else torch.tensor(weights)
    mean = (of_tokens * w[y.clamp(min=0)] * (y != -100)).sum() / split.num_terms
    assert found.loss == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.parametrize("hold", [False, True])
def test_the_penalty_of_windows_that_begin_with_a_state(hold):
    """By example, in value and gradient, against dense Jacobians at the state carried to them."""
    model = model_of("lstm")
    params, y = trainable(model), numbers(2 * T, seed=4).view(2, T)
    generator = torch.Generator().manual_seed(2)
    state, u = torch.randn(2, 2, 2, 2, dtype=torch.float64, generator=generator), {
        n: torch.randn(p.shape, dtype=torch.float64, generator=generator) for n, p in params.items()
    }  # fmt: skip

    def outputs(given):
        X = numbers(2 * T).view(2, T)
        return functional_call(model, given, (X,), {"state": state})["logits"]

    with differentiable_ops(order=2, by_example=True):
        found = outputs(params)
    (value,) = ByExample().samples(
        found, params, Tokens(), y, draws=Draws(), generator=generator.manual_seed(3), hold=hold
    )
    signs, at = draw_signs(found.detach(), generator.manual_seed(3)), found.detach()

    def truth(step):
        moved = {n: p.detach() + step * u[n] for n, p in params.items()}
        rows = torch.autograd.functional.jacobian(
            lambda *values: outputs(dict(zip(moved, values, strict=True))), tuple(moved.values())
        )
        f = at if hold else outputs(moved)
        B_e, traces, total = Tokens().root(f, y, signs), Tokens().curvature_traces(f, y), 0.0
        for each, J in zip(moved, (rows.flatten(3) for rows in rows), strict=True):
            if each.startswith("decoder"):  # in closed form; a word's row of J is h, or 1
                total += (J[:, :, 0].square().sum(-1) * traces).sum().item()
            else:
                total += torch.einsum("ntv,ntvp->np", B_e, J).square().sum().item()
        return total / y.numel()

    assert value.item() == pytest.approx(truth(0), rel=1e-9)
    grads = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
    slope = sum((g * u[n]).sum().item() for n, g in zip(params, grads, strict=True))
    assert slope == pytest.approx((truth(1e-5) - truth(-1e-5)) / 2e-5, rel=1e-5)


def _counted(calls, own=F.cross_entropy):
    def take(*args, **kwargs):
        calls.append(args)
        return own(*args, **kwargs)

    return take
