"""Estimates by products: a model's own Functions, and parameters that it reads by other names."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from hesstrace_cli.analysis.estimation import data_loss, estimate
from hesstrace_cli.analysis.verify import _rows
from hesstrace_cli.autodiff.calls import reads_by_other_names, trainable
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.checks.verdicts import GOOD
from hesstrace_cli.curvature.flatness import Landscape, average_sharpness
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.data.preprocess import Preprocess
from hesstrace_cli.data.splits import TensorSplit
from hesstrace_cli.errors import DerivativeError
from tests.conftest import assert_one_line_error, invoke, train_to_end
from tests.curvature import oracles
from tests.planted import (
    REFUSED,
    RIGHT,
    RIGHT_FOR_G,
    Aliased,
    Body,
    FirstOrderForward,
    Tanh,
    WrongSecond,
)

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(16) % 3


class CutInG(Tanh):
    """Its backward is right, and linear in g for nobody who differentiates it."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g.detach() * (1 - y * y)


class WrongForward(FirstOrderForward):
    @staticmethod
    def jvp(ctx, t):
        return 0.5 * t


class InSomeBatches(nn.Module):
    """Runs its own Function for the last examples alone."""

    def forward(self, h):
        return WrongSecond.apply(h) if h.abs().max() > 1.5 else h.tanh()


WRONG_SECOND = {
    **{name: REFUSED[name] for name in ("wrong second", "1 % wrong", "no second", "behind a gate",
                                        "wrong in a few examples", "checkpointed, wrong")},
    "cut in g": lambda: Body(CutInG.apply),
    "in some batches": lambda: Body(InSomeBatches()),
}  # fmt: skip
WRONG_FOR_G = {
    "cut in g": lambda: Body(CutInG.apply),
    "wrong jvp": lambda: Body(WrongForward.apply),
}


def build(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double().eval()


def estimated(model, batch_size=8, **settings):
    split = TensorSplit(X, Y, Preprocess(), torch.float64)
    return estimate(model, split, EstimateConfig(batch_size=batch_size, **settings))


@pytest.mark.parametrize("method", ["auto", "hutchinson", "xtrace"])
@pytest.mark.parametrize("name", WRONG_SECOND)
def test_a_wrong_second_derivative_of_a_users_own_is_refused(name, method):
    with pytest.raises(DerivativeError, match="second derivative"):
        estimated(build(WRONG_SECOND[name]), method=method, max_passes=1)


@pytest.mark.parametrize("name", WRONG_FOR_G)
def test_products_with_g_need_what_exact_traces_do_not(name):
    model = build(WRONG_FOR_G[name])
    with pytest.raises(DerivativeError, match="second derivative"):
        estimated(model, method="hutchinson", curvature="ggn", max_passes=1)
    truth = oracles.dense_ggn(
        Objective(build(RIGHT["reverse only"]), trainable(build(RIGHT["reverse only"]))), X
    )
    found = estimated(model, curvature="ggn").result.total.value
    assert found == pytest.approx(truth.trace().item(), rel=1e-6)


@pytest.mark.parametrize("name", ["reverse only", "first-order jvp", "wrong third"])
def test_a_right_one_is_taken(name):
    model = build({**RIGHT, **RIGHT_FOR_G}[name])
    assert "proved" not in estimated(model, method="hutchinson", max_passes=1).reason
    assert estimated(model).method == "exact"


@pytest.mark.parametrize("kind", ["list", "captured", "tied"])
def test_products_reach_what_is_read_by_another_name(kind):
    model, same = build(lambda: Aliased(kind)), build(lambda: Aliased("tied"))
    truth = oracles.dense_ggn(Objective(same, trainable(same)), X).trace().item()
    for settings in ({}, {"method": "xtrace", "num_probes": 123}):
        found = estimated(model, curvature="ggn", **settings).result.total.value
        assert found == pytest.approx(truth, rel=1e-6)
    assert reads_by_other_names(model, X) == (kind != "tied")


@pytest.mark.parametrize("kind", ["list", "captured"])
def test_so_do_displaced_weights(kind):
    split = TensorSplit(X, Y, Preprocess(), torch.float64)

    def sharpness(kind):
        data = data_loss(build(lambda: Aliased(kind)), split, 8)
        generator = torch.Generator().manual_seed(0)
        found = average_sharpness(
            Landscape(data), radius=0.5, normalized=False, num_directions=2, generator=generator
        )
        return found.value

    assert sharpness(kind) == sharpness("tied")


MODELS = """
import torch
from torch import nn

class Bumped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.detach().tanh().square())

class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(64, 6), nn.Linear(6, 10)
    def forward(self, X):
        return self.head(Bumped.apply(self.inner(X.flatten(1))))
"""


def test_commands_give_no_number_for_a_wrong_second_derivative(tmp_path):
    (tmp_path / "models.py").write_text(MODELS)
    run = train_to_end(
        tmp_path / "run", model=f"{tmp_path}/models.py:Body", model_arg={}, reg=["none"],
        top_eigenvalue=True,
    )  # fmt: skip
    summary = run.finish()
    assert summary["trace"]["trace"] is None
    assert "Bumped" in summary["trace"]["reason"]
    assert summary["top_eigenvalue"] is None
    model = ("--model", f"{tmp_path}/models.py:Body", "--num-examples", "40")
    for command in ("estimate-trace", "spectrum"):
        result = invoke(command, tmp_path / "run" / "last.pt", *model)
        assert_one_line_error(result, 4, "Bumped", "second derivative")
    flags = ("--curvature", "ggn", "--json", "-")
    result = invoke("estimate-trace", tmp_path / "run" / "last.pt", *model, *flags)
    assert json.loads(result.stdout)["method"] == "exact"


def test_verify_has_a_row_for_each_use():
    """What is wrong for one is not for another: rows name the penalty, or the estimate."""

    def bad(make):
        model = build(make)
        found = list(_rows(Objective(model, trainable(model)), X, Y, "eval", 0))
        assert {"eval: estimate, v'Hv, value", "eval: estimate, v'Gv, value"} <= {
            row.check for row in found
        } or any(row.verdict == "refused" for row in found)
        return {row.check.split(",")[0] for row in found if row.verdict not in GOOD}

    assert bad(RIGHT["reverse only"]) == set()
    assert bad(RIGHT_FOR_G["wrong third"]) == {"eval: penalty on tr(H)"}
    assert bad(WRONG_FOR_G["wrong jvp"]) == {"eval: estimate"}
    assert bad(REFUSED["wrong second"]) == {
        "eval: penalty on tr(H)", "eval: penalty on tr(G)", "eval: estimate"
    }  # fmt: skip
