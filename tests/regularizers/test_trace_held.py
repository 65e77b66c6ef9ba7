"""The trace penalty with the curvature in the outputs held: value of one, gradient of the other."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from hesstrace_cli import TracePenalty, differentiable
from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.distributed.parallel import ALONE
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.regularizers import Setting, build
from hesstrace_cli.tasks import Classification
from tests.conftest import TINY, assert_one_line_error, invoke, train_to_end
from tests.regularizers.test_trace import CONFIG, OPTIONS, case, step_of
from tests.test_parts import SMALL, assert_close, weights_of


class Detaching(Classification):
    """Its curvature is a constant to whoever differentiates."""

    def root(self, outputs, targets, e):
        return super().root(outputs.detach(), targets, e)

    def label_root(self, outputs, targets, noise):
        return super().label_root(outputs.detach(), targets, noise)

    def curvature_traces(self, outputs, targets):
        return super().curvature_traces(outputs.detach(), targets)


class Drawn(Classification):
    """Every example draws one label."""

    label = 0

    def label_root(self, outputs, targets, noise):
        noise = torch.zeros_like(noise)
        noise[:, self.label] = 1.0
        return super().label_root(outputs, targets, noise)


def slopes(name, objective, X, y, settings):
    (penalty,) = build({name: 1.0}, dataclasses.replace(CONFIG, **settings))
    penalty.prepare(Setting(objective, X, y, len(X), 3, 10, ALONE))
    value = penalty.term(step_of(penalty, objective, X, y)).value
    return value, gradient(value, objective.params)


@pytest.mark.parametrize(
    "option",
    [
        *(option for option in OPTIONS if not option.endswith("H")),
        pytest.param("compiled", marks=pytest.mark.slow),
    ],
)
def test_the_gradient_is_that_of_the_jacobian_alone(option):
    settings = {**OPTIONS, "compiled": {"form": "batch", "compile": True}}[option]
    objective, X, y = case("gelu")
    held = slopes("trace-held", objective, X, y, settings)
    constant = dataclasses.replace(objective, task=Detaching())
    torch.testing.assert_close(held, slopes("trace", constant, X, y, settings))
    full = slopes("trace", objective, X, y, settings)
    torch.testing.assert_close(held[0], full[0])
    assert any(not torch.allclose(held[1][n], full[1][n]) for n in full[1])


def test_drawn_labels_hold_it_in_the_mean_over_them():
    """What drawn labels say of A is constant, and p - e_y has no slope in their mean."""
    objective, X, y = case("gelu")
    X, y = X[:1], y[:1]
    shares = objective.model(X).softmax(1)[0].detach()
    means = {"trace": 0.0, "trace-held": 0.0}
    for label, share in enumerate(shares):
        Drawn.label = label
        drawn = dataclasses.replace(objective, task=Drawn())
        for name in means:
            _, found = slopes(name, drawn, X, y, {"form": "batch", "draw": "labels"})
            means[name] = means[name] + share * torch.cat([found[n].flatten() for n in found])
    torch.testing.assert_close(means["trace"], means["trace-held"])


def test_accumulation_equals_the_big_batch(tmp_path):
    settings = {**SMALL, "reg": "trace-held=0.01", "warmup": 0}
    whole = train_to_end(tmp_path / "a", **settings)
    parts = train_to_end(tmp_path / "b", accumulate=4, **settings)
    assert_close(weights_of(whole), weights_of(parts))
    other = train_to_end(tmp_path / "c", **{**settings, "reg": "trace=0.01"})
    assert any(not torch.equal(p, weights_of(other)[n]) for n, p in weights_of(whole).items())


@pytest.mark.parametrize("form", ["batch", "example"])
def test_in_anyones_loop(form):
    objective, X, y = case("gelu")
    found = {}
    for hold in (False, True):
        penalty = TracePenalty(
            objective.model, 1.0, form=form, estimator="hutchinson", hold_logit_curvature=hold
        )
        with differentiable():
            outputs = objective.model(X)
        value = penalty(outputs, y)
        found[hold] = value, gradient(value, objective.params)
        assert penalty.description()["hold_logit_curvature"] is hold
    torch.testing.assert_close(found[True][0], found[False][0])
    assert not torch.allclose(found[True][1]["0.weight"], found[False][1]["0.weight"])
    with pytest.raises(ConfigError, match="hold_logit_curvature is of tr"):
        TracePenalty(objective.model, 1.0, curvature="hessian", hold_logit_curvature=True)


def test_on_the_command_line(tmp_path):
    result = invoke("train", *TINY, "--reg", "trace-held", "--out", tmp_path / "r")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["regularizers"] == "trace-held=0.01"
    assert summary["trace_penalty"]["hold_logit_curvature"] is True
    for flags, words in (
        (["--reg", "trace-held", "--curvature", "hessian"], "--curvature is hessian"),
        (["--reg", "trace", "--reg", "trace-held"], "trace and trace-held both penalize the trace"),
    ):
        assert_one_line_error(invoke("train", *TINY, *flags), 2, words)
