"""No penalty is trained on by a wrong derivative, and `verify` accuses the same models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hesstrace_cli.analysis.verify import _rows
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.autodiff.casting import on_copies
from hesstrace_cli.autodiff.precision import run_in_precision
from hesstrace_cli.curvature.checks.engines import choose_engine
from hesstrace_cli.curvature.checks.verdicts import GOOD, Row, merged
from hesstrace_cli.curvature.hessian import quadratic_form
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.trace.exact import PerExampleTrace
from hesstrace_cli.errors import DerivativeError, Stopped
from tests.conftest import assert_one_line_error, invoke, make_run, train_to_end
from tests.curvature import oracles
from tests.planted import REFUSED, RIGHT, RIGHT_FOR_G, Aliased, Body, Odd, Tokens

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3


def build(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().train()


def objective_of(model):
    return Objective(model, trainable(model))


def chosen(model, curvature, *, compiled=False, single=True, seed=0):
    return choose_engine(
        objective_of(model), X, Y, curvature=curvature, compiled=compiled, single=single, seed=seed
    )


def accused(model):
    rows = [row for mode in ("train", "eval") for row in
            _rows(objective_of(model.train(mode == "train")), X[:8], Y[:8], mode, 0)]  # fmt: skip
    return [row for row in rows if row.verdict not in GOOD]


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_engine_is_found(name, curvature):
    model = build(RIGHT[name])
    before, random = state(model), torch.get_rng_state()
    chosen(model, curvature)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", RIGHT)
def test_verify_accuses_none_of_them(name):
    assert not accused(build(RIGHT[name]))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_derivative_is_refused(name, curvature):
    model = build(REFUSED[name])
    before = state(model)
    with pytest.raises(DerivativeError):
        chosen(model, curvature)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", [*REFUSED, *RIGHT_FOR_G])
def test_verify_accuses_all_of_them(name):
    assert accused(build({**REFUSED, **RIGHT_FOR_G}[name]))


@pytest.mark.parametrize("name", RIGHT_FOR_G)
def test_third_derivatives_matter_to_the_hessian_alone(name):
    assert chosen(build(RIGHT_FOR_G[name]), "ggn").engine == "reverse"
    with pytest.raises(DerivativeError, match="gradient"):
        chosen(build(RIGHT_FOR_G[name]), "hessian")


@pytest.mark.parametrize(
    ("name", "engine", "why"),
    [
        ("fft", "taylor", "agrees"),
        ("cast to integers", "taylor", "agrees"),
        ("view written", "forward", "memory that another tensor views"),
        ("reverse only", "reverse", "forward mode refused"),
        ("logdet", "reverse", "taylor mode, value wrong"),
        ("norm", "reverse", "taylor mode refused"),
        ("alias in a list", "taylor", "agrees"),
    ],
)
def test_it_says_which_engine_and_why(name, engine, why):
    found = chosen(build(RIGHT[name]), "hessian")
    assert found.engine == engine
    assert why in found.engine_reason


class Rough(nn.Module):
    """Kinks wherever one looks, for few examples: differences depend on their step."""

    def __init__(self, most=10**9):
        super().__init__()
        self.inner, self.head, self.most = nn.Linear(8, 6), nn.Linear(6, 3), most

    def forward(self, X):
        h = self.inner(X)
        if len(X) < self.most:
            h = h + sum(10.0**-n * torch.sin(10.0 ** (2 * n) * h) for n in range(1, 12))
        return self.head(h)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_what_differences_do_not_settle_is_refused_and_accused(curvature):
    with pytest.raises(DerivativeError, match=r"cannot be proved.*depend on their step"):
        chosen(build(Rough), curvature)
    assert any(row.verdict == "unsettled" for row in accused(build(Rough)))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_more_examples_settle_it_for_both(curvature):
    model = build(lambda: Rough(16))
    found = choose_engine(
        objective_of(model), X, Y, curvature=curvature, compiled=False, single=True, seed=0, first=8
    )
    assert "agrees" in found.engine_reason
    rows = list(_rows(objective_of(model), X, Y, "train", 0, 8))
    assert all(row.verdict in GOOD for row in rows), rows


def test_of_two_tries_what_is_wrong_once_is_wrong():
    rows = {verdict: Row("a check", verdict, "") for verdict in ("right", "wrong", "unsettled")}
    for before, now, expected in (
        ("unsettled", "right", "right"), ("unsettled", "wrong", "wrong"),
        ("right", "unsettled", "right"), ("right", "wrong", "wrong"), ("wrong", "right", "wrong"),
        ("unsettled", "unsettled", "unsettled"),
    ):  # fmt: skip
        assert [r.verdict for r in merged([rows[before]], [rows[now]])] == [expected]


def test_the_same_engine_each_time():
    found = [chosen(build(RIGHT["logdet"]), "hessian") for _ in range(2)]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["list", "captured"])
def test_what_is_compiled_is_a_function_of_the_parameters_alone(kind):
    for curvature in ("hessian", "ggn"):
        with pytest.raises(DerivativeError):
            chosen(build(lambda: Aliased(kind)), curvature, compiled=True)
        assert chosen(build(RIGHT["weight norm"]), curvature, compiled=True)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_under_half_precision_what_is_wrong_is_seen_as_well(curvature):
    for name in ("wrong second", "1 % wrong", "behind a gate"):
        model = build(REFUSED[name])
        run_in_precision(model, "bf16", X.device)
        with pytest.raises(DerivativeError):
            chosen(model, curvature, single=False)
    model = build(RIGHT["llama's norm"])
    run_in_precision(model, "bf16", X.device)
    assert "agrees" in chosen(model, curvature, single=False).engine_reason


@pytest.mark.parametrize("error", [TypeError, AssertionError])
def test_what_cannot_run_in_double_precision_is_checked_in_its_own(error):
    def single(h):
        if h.dtype != torch.float32:
            raise error("a kernel for float32 alone")
        return h

    assert chosen(build(lambda: Body(lambda h: torch.tanh(single(h)))), "hessian")
    wrong = build(lambda: Body(lambda h: REFUSED_BODY(single(h))))
    with pytest.raises(DerivativeError):
        chosen(wrong, "hessian")
    right = build(lambda: Body(lambda h: torch.tanh(single(h))))
    rows = list(_rows(objective_of(right), X, Y, "eval", 0))
    assert all(row.verdict in GOOD for row in rows), rows
    assert any("checked in float64" in row.check and row.verdict == "no" for row in rows)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("read", [
    lambda h, table: h @ table, lambda h, table: torch.cat([h, h @ table[:, :2]], 1)[:, -6:],
    lambda h, table: torch.einsum("ni,ij->nj", h, table.T), lambda h, table: 2 * table[0] + h,
    lambda h, table: h.to(table.dtype).matmul(table), lambda h, table: F.linear(h, weight=table),
])  # fmt: skip
def test_tables_that_no_module_holds_are_widened(read, curvature):
    """Kinks leave nothing to be told in float32."""
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    model = build(lambda: Body(lambda h: torch.relu(read(h, table))))
    assert "agrees" in chosen(model, curvature).engine_reason
    rows = list(_rows(objective_of(model), X, Y, "eval", 0))
    assert all(row.verdict in GOOD for row in rows), rows
    assert not any("checked in float64" in row.check for row in rows)
    assert table.dtype == torch.float32


def REFUSED_BODY(h):
    return torch.tanh(h) * h.detach().square()


def test_scripted_parts_end_in_no_traceback():
    accused(build(lambda: Odd("scripted")))
    chosen(build(lambda: Odd("scripted")), "hessian")


def test_tensors_hold_what_they_held():
    model = build(lambda: nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3)))
    model[0].weight.grad = torch.ones(3, 8)
    tensors = [*model.parameters(), *model.buffers()]
    pointers = [t.data_ptr() for t in tensors]
    with on_copies(model, double=True):
        assert model[0].weight.dtype == torch.zeros(1).dtype == torch.float64
        model[0].weight.data.zero_()
        assert model(X.double()).float().dtype == torch.float64
    assert [t.data_ptr() for t in tensors] == pointers
    assert model[0].weight.abs().sum() > 0
    assert model[0].weight.grad.sum() == 24


MODELS = """
import torch
from torch import nn

class Body(nn.Module):
    def __init__(self, wrong):
        super().__init__()
        self.inner, self.head, self.wrong = nn.Linear(64, 6), nn.Linear(6, 10), wrong
    def forward(self, X):
        h = self.inner(X.flatten(1))
        if self.wrong:
            h = torch.tanh(h) * h.detach()
        return self.head(h / h.norm(dim=1, keepdim=True))

def right(): return Body(False)
def wrong(): return Body(True)
"""


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_a_run_says_its_engine_and_resumes_with_it(curvature, tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    settings = {
        "model": f"{tmp_path}/models.py:right", "model_arg": {}, "reg": ["trace=0.01"],
        "curvature": curvature, "warmup": 0.0,
    }  # fmt: skip
    whole = train_to_end(tmp_path / "whole", **settings)
    said = whole.finish()["trace_penalty"]
    assert said["engine"] == "reverse"
    assert ("taylor mode refused" in said["engine_reason"]) == (curvature == "hessian")
    first = make_run(tmp_path / "parts", **settings)
    with pytest.raises(Stopped):
        list(first.advance(iter([None, 15]).__next__))
    rest = make_run(tmp_path / "parts", **settings, resume=True)
    (resumed,), (penalty,) = rest.trainer.regularizers, whole.trainer.regularizers
    assert resumed.engine == penalty.engine
    list(rest.advance())
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.trainer.model.parameters(), rest.trainer.model.parameters(), strict=True
        )
    )


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_what_verify_accuses_is_not_trained_with_a_penalty(curvature, tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    model = ("--model", f"{tmp_path}/models.py:wrong", "--train-examples", "100")
    flags = ("--epochs", "1", "--curvature", curvature, "--lambda", "0.01")
    result = invoke("train", *model, *flags, "--reg", "trace", "--out", tmp_path / "run")
    assert_one_line_error(result, 4, "derivative is wrong", "detach")
    assert not (tmp_path / "run").exists()
    result = invoke("train", *model, "--epochs", "1", "--reg", "none", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", ["module", "function", "scaled", "tied"])
def test_padding_rows_are_held_in_every_engine_and_in_exact_traces(kind):
    model = build(lambda: Tokens(kind)).double().eval()
    objective, X64 = objective_of(model), X.double()
    params = objective.params
    H, G = oracles.dense_hessian(objective, X64, Y), oracles.dense_ggn(objective, X64)
    for mode in ("taylor", "forward", "reverse"):
        total = 0.0
        for column in torch.eye(len(H), dtype=H.dtype):
            v = oracles.unflatten(column, params)
            total += quadratic_form(
                lambda p: objective.loss(p, X64, Y), params, v, mode=mode
            ).item()  # fmt: skip
        assert total == pytest.approx(H.trace().item(), rel=1e-9)
    exact = PerExampleTrace(objective, X64).exact(X64, Y)
    assert exact.sum(1).mean().item() == pytest.approx(G.trace().item(), rel=1e-9)
