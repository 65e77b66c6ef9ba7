"""Traces and penalties of language models against dense derivatives, over 20 words."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesstrace_cli.analysis import method_choice
from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.autodiff.calls import recorded_outputs, trainable
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.by_example import ByExample
from hesstrace_cli.curvature.probes import Draws, draw_signs
from hesstrace_cli.curvature.trace.change import trace_change
from hesstrace_cli.curvature.trace.exact import PerExampleTrace
from tests.tasks.cases import flat_params, mean_in_words, outputs_at
from tests.tasks.languages import MODELS, language, moved, sample, traces, untied
from tests.tasks.test_penalties import check_on_hessian

STEP = 1e-5


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def direction(name, seed=5):
    draw = generator(seed)
    return {
        n: torch.randn(p.shape, generator=draw, dtype=p.dtype)
        for n, p in language(name).model.named_parameters()
    }


def outputs(name):
    given, params = untied(name)
    return given(params).detach()


def along(value, case, u):
    names = dict(case.model.named_parameters())
    grads = torch.autograd.grad(value, list(names.values()), materialize_grads=True)
    return sum((g * u[n]).sum().item() for n, g in zip(names, grads, strict=True))


@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("name", MODELS)
def test_signs_are_of_the_dense_trace_and_without_noise_in_the_output_layer(
    name, chunk, monkeypatch
):
    monkeypatch.setattr("hesstrace_cli.curvature.per_example.head.PART", chunk)
    case, f = language(name), outputs(name)
    objective = Objective(case.model, trainable(case.model), case.task)
    per_example = PerExampleTrace(objective, case.X)
    assert per_example.without_rule() == []
    samples = per_example.sample(case.X, case.y, 200, generator()).sum(1)
    samples = samples / case.task.num_terms(case.y)
    truth = traces(name, untied(name)[1], f)
    for index, each in enumerate(objective.params):
        own = samples[:, index]
        error = own.std().item() / math.sqrt(len(own))
        assert abs(own.mean().item() - truth[each]) <= 4.5 * error + 1e-9 * truth[each], each
        assert (error < 1e-9) == each.startswith("head"), each


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_penalty_by_example_and_its_gradient(name, hold):
    case = language(name)
    params = trainable(case.model)
    found = recorded_outputs(case.model, params, case.X)
    by_example = ByExample()
    (value,) = by_example.samples(
        found, params, case.task, case.y, draws=Draws(), generator=generator(), hold=hold
    )
    kinds = {n: way.kind for n, way in by_example.ways.items()}
    assert all(
        kind == ("closed" if n.startswith("head") else "example") for n, kind in kinds.items()
    )
    signs, u, f = draw_signs(found, generator()), direction(name), found.detach()
    given, _ = untied(name)

    def truth(step):
        at = moved(name, step, u)
        return sample(name, at, f if hold else given(at), signs)

    assert value.item() == pytest.approx(truth(0), rel=1e-9)
    slope = (truth(STEP) - truth(-STEP)) / (2 * STEP)
    assert along(value, case, u) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(("name", "hold"), [("lstm, tied", False), ("gpt", True)])
def test_the_penalty_is_unbiased_in_value_and_gradient(name, hold):
    case, u, (given, _) = language(name), direction(name), untied(name)
    params = trainable(case.model)
    f = outputs(name)

    def truth(step):
        at = moved(name, step, u)
        return sum(traces(name, at, f if hold else given(at)).values())

    by_example, draw, values, slopes = ByExample(), generator(), [], []
    draws = Draws(scheme="tensor", keep_prob=0.5)
    for _ in range(100):
        found = recorded_outputs(case.model, params, case.X)
        (value,) = by_example.samples(
            found, params, case.task, case.y, draws=draws, generator=draw, hold=hold
        )
        values.append(value.item())
        slopes.append(along(value, case, u))
    for got, expected in (
        (values, truth(0)), (slopes, (truth(STEP) - truth(-STEP)) / (2 * STEP)),
    ):  # fmt: skip
        got = torch.tensor(got, dtype=torch.float64)
        error = got.std().item() / math.sqrt(len(got))
        assert abs(got.mean().item() - expected) <= 4.5 * error


@pytest.mark.parametrize("name", MODELS)
def test_the_penalty_on_the_hessian(name):
    with sdpa_kernel(SDPBackend.MATH):  # the oracle cannot differentiate any other twice
        check_on_hessian(language(name))


@pytest.mark.parametrize("name", ["gpt, tied"])
def test_a_change_of_the_trace_is_taken_apart(name, monkeypatch):
    case, (given, _), u = language(name), untied(name), direction(name)
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p += 0.2 * u[n]
    losses = [dataclasses.replace(case, model=m).data(3) for m in (case.model, model)]
    params = [moved(name, step, u) for step in (0, 0.2)]
    L = [
        [math.log(sum(traces(name, j, given(a).detach()).values())) for j in params]
        for a in params
    ]  # fmt: skip
    A = (L[1][0] - L[0][0] + L[1][1] - L[0][1]) / 2
    J = (L[0][1] - L[0][0] + L[1][1] - L[1][0]) / 2
    assert min(abs(A), abs(J)) > 0.01
    by_signs = trace_change(*losses, num_probes=30, seed=0)
    assert abs(by_signs.of_curvature - A) <= 4.5 * by_signs.of_curvature_stderr < 0.5
    assert abs(by_signs.of_jacobian - J) <= 4.5 * by_signs.of_jacobian_stderr < 0.5

    def exact(self, X, y, num_samples, _):
        return self.exact(X, y).expand(num_samples, -1, -1)

    monkeypatch.setattr(PerExampleTrace, "sample", exact)
    found = trace_change(*losses, num_probes=2, seed=0)
    got = found.before, found.with_jacobian_after, found.with_curvature_after, found.after
    assert got == pytest.approx([math.exp(each) for row in L for each in row], rel=1e-9)
    assert (found.of_curvature, found.of_jacobian) == pytest.approx((A, J), rel=1e-9)
    assert found.of_curvature_stderr == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["lstm", pytest.param("gpt, tied", marks=pytest.mark.slow)])
def test_the_trace_of_the_hessian_by_signs_and_what_is_left(name, monkeypatch):
    """What is left has no part in an output layer of its own, and no noise there."""
    monkeypatch.setattr(method_choice, "MAX_DIAGONAL", 0)
    case = language(name)
    with sdpa_kernel(SDPBackend.MATH):
        truth = torch.autograd.functional.hessian(
            lambda w: mean_in_words(case.task, outputs_at(case, w), case.y), flat_params(case)
        ).trace()
    config = EstimateConfig(dtype="float64", batch_size=3, num_probes=20)
    found = estimate(case.model, case.split, config)
    assert found.method == "signs+hutchinson"
    low, high = found.interval
    assert low <= truth.item() <= high
    is_exact = {n for n, (_, stderr) in found.per_layer.items() if stderr == 0}
    assert is_exact == (set() if "tied" in name else {"head.weight", "head.bias"})
