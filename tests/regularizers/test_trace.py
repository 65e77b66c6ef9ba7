"""The trace penalty's forms: unbiased with every option, additive over the parts of a batch."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.config import TrainConfig
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.distributed.parallel import ALONE
from hesstrace_cli.errors import ConfigError
from hesstrace_cli.regularizers import Part, Setting, Step, build
from tests.conftest import make_run, train_to_end
from tests.curvature import oracles
from tests.curvature.test_exact import Function
from tests.curvature.test_exact import build as built
from tests.curvature.zoo import make
from tests.tasks.cases import case_of

CONFIG = TrainConfig(warmup=0.0, curvature="ggn", estimator="hutchinson", form="example")


def penalty_for(objective, X, y, **settings):
    """The penalty, after it has looked at a batch."""
    (penalty,) = build({"trace": 1.0}, dataclasses.replace(CONFIG, **settings))
    penalty.prepare(Setting(objective, X, y, len(X), 3, 10, ALONE))
    return penalty


def step_of(penalty, objective, X, y, seed=0):
    by_example = penalty.by_example
    with differentiable_ops(order=penalty.order, by_example=by_example):
        outputs = objective.model(X)
    loss = objective.task.loss(outputs, y)
    whole = Part(torch.arange(len(X)), len(X), 1.0, len(X), 1.0)
    draws = torch.Generator().manual_seed(seed)
    return Step(objective, X, y, outputs, loss, whole, 0, 0.5, draws, draws.get_state())


def case(name, *, train=True):
    model, X, y = make(name, train=train)
    return Objective(model, trainable(model)), X, y


OPTIONS = {
    "all": {},
    "the batch's sum": {"form": "batch"},
    "labels": {"form": "batch", "draw": "labels"},
    "two probes": {"num_probes": 2},
    "tensors": {"estimator": "dropout", "keep_prob": 0.5},
    "blocks": {"estimator": "dropout", "keep_prob": 0.5, "dropout_scheme": "block"},
    "entries": {"estimator": "dropout", "keep_prob": 0.5, "dropout_scheme": "entry"},
    "half the examples": {"penalty_examples": 0.5},
    "half the examples, tensors": {
        "penalty_examples": 0.5, "estimator": "dropout", "keep_prob": 0.5
    },
    "half the examples, batch form": {"penalty_examples": 0.5, "form": "batch"},
    "half the examples, H": {
        "penalty_examples": 0.5, "form": "auto", "curvature": "hessian", "num_probes": 4
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "name"),
    [*((option, "gelu") for option in OPTIONS), ("tensors", "tied"), ("tensors", "transformer")],
)
def test_it_is_unbiased(option, name):
    objective, X, y = case(name)
    dense = oracles.dense_hessian if option.endswith("H") else None
    truth = (dense(objective, X, y) if dense else oracles.dense_ggn(objective, X)).trace()
    penalty = penalty_for(objective, X, y, **OPTIONS[option])
    values = torch.stack([
        penalty.term(step_of(penalty, objective, X, y, seed)).value.detach() for seed in range(200)
    ])  # fmt: skip
    assert abs(values.mean() - truth) < 4 * values.std() / len(values) ** 0.5


def test_over_all_choices_of_ragged_examples_the_mean_is_that_of_the_batch(monkeypatch):
    """Of tr(H), with one probe: no draws, so that a wrong share is no noise."""
    ragged = case_of("tokens, tanh")
    X, y = ragged.X[1:7], ragged.y[1:7]
    objective = Objective(ragged.model, trainable(ragged.model), ragged.task)
    assert len({ragged.task.num_terms(y[i : i + 1]) for i in range(6)}) > 2

    def value(share):
        settings = {"curvature": "hessian", "form": "auto", "penalty_examples": share}
        penalty = penalty_for(objective, X, y, **settings)
        return penalty.term(step_of(penalty, objective, X, y)).value.item()

    whole, found = value(1.0), []
    for chosen in itertools.combinations(range(6), 3):
        order = torch.tensor([*chosen, *sorted(set(range(6)) - set(chosen))])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randperm", lambda *_, order=order, **__: order)
            found.append(value(0.5))
    assert len(set(found)) == 20
    assert sum(found) / len(found) == pytest.approx(whole, rel=1e-10)


def test_examples_have_less_noise_than_their_sum():
    objective, X, y = case("gelu")

    def spread(form):
        penalty = penalty_for(objective, X, y, form=form)
        grads = [
            torch.cat([
                g.flatten() for g in torch.autograd.grad(
                    penalty.term(step_of(penalty, objective, X, y, seed)).value,
                    list(objective.params.values()),
                )
            ]) for seed in range(60)
        ]  # fmt: skip
        return torch.stack(grads).var(0).sum()

    assert spread("example") < spread("batch") / 3


def test_the_parts_of_a_batch_add_up_without_being_gathered(tmp_path):
    """In float64, three rounds against one: loss, penalty and gradients."""
    found = []
    for number, accumulate in enumerate((1, 3)):
        run = make_run(
            tmp_path / str(number), reg="trace=0.1", form="example", warmup=0, batch_size=17,
            accumulate=accumulate, model_arg={"width": 3, "norm": "group", "activation": "gelu"},
        )  # fmt: skip
        trainer = run.trainer
        trainer.model.double()
        train = dataclasses.replace(trainer.data.train, dtype=torch.float64)
        trainer.data = dataclasses.replace(trainer.data, train=train)
        (examples,) = trainer.examples([torch.arange(17)])
        passes = []
        trainer.model.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        trainer.take_step(examples)
        assert len(passes) == accumulate
        sums = trainer.reduce()
        found.append([*(p.grad for p in trainer.model.parameters()),
                      torch.tensor([sums.loss, sums.penalty], dtype=torch.float64)])  # fmt: skip
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-13)


def mixed(m, X):
    """The examples meet in the middle."""
    hidden = torch.tanh(X @ m.a)
    return torch.tanh(hidden + hidden.mean(0)) @ m.b @ m.c


def test_in_front_of_where_examples_meet_the_sum_is_taken():
    objective, X, y = built(lambda: Function(mixed, a=(8, 4), b=(4, 4), c=(4, 3)))
    penalty = penalty_for(objective, X, y)
    said = penalty.description()
    assert said["form"] == "example"
    assert said["form_reason"] == (
        "1 of 3 tensors by example; 1 in closed form; 1 of the whole batch as examples touch each "
        "other (a)"
    )
    values = torch.stack([
        penalty.term(step_of(penalty, objective, X, y, seed)).value.detach() for seed in range(400)
    ])  # fmt: skip
    outputs = objective.model(X)
    p = F.softmax(outputs, 1)
    roots = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
    exact = sum(
        torch.cat([g.flatten() for g in torch.autograd.grad(
            (outputs[i] * roots[i, :, c].detach()).sum(), list(objective.params.values()),
            retain_graph=True,
        )]).square().sum()
        for i in range(len(X)) for c in range(3)
    ) / len(X)  # fmt: skip
    assert abs(values.mean() - exact) < 4 * values.std() / 20


def test_where_all_is_in_front_of_it_the_form_is_the_batchs():
    objective, X, y = built(
        lambda: Function(lambda m, X: (lambda h: h - h.mean(0))(X @ m.a), a=(8, 3))
    )
    said = penalty_for(objective, X, y).description()
    assert (said["form"], said["form_reason"]) == (
        "batch",
        "0 of 1 tensors by example; 1 of the whole batch as examples touch each other (a)",
    )


@pytest.mark.parametrize(("settings", "form"), [
    ({"model_arg": {"norm": "batch"}}, "batch"),
    ({"model_arg": {"norm": "group"}}, "example"),
    ({"model": "mlp"}, "example"),
    ({"model": "mlp", "form": "batch"}, "batch"),
    ({"model": "mlp", "draw": "labels"}, "batch"),
])  # fmt: skip
def test_the_form_that_auto_takes(tmp_path, settings, form):
    """By example where no batch statistics let examples meet, and the run says so."""
    run = make_run(tmp_path / "a", reg="trace=0.1", train_examples=40, **settings)
    assert run.trainer.regularizers[0].description()["form"] == form


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_in_half_precision(tmp_path, precision, norm):
    grads = []
    for number, dtype in enumerate(("float32", precision)):
        run = make_run(
            tmp_path / str(number), reg="trace=0.1", form="example", warmup=0, precision=dtype,
            model_arg={"width": 4, "norm": norm},
        )  # fmt: skip
        run.trainer.stepper.scaler = torch.amp.GradScaler("cpu", enabled=False)
        assert "whole batch" not in run.trainer.regularizers[0].description()["form_reason"]
        next(run.advance())
        grads.append(torch.cat([p.grad.flatten() for p in run.trainer.model.parameters()]))
    assert (grads[0] - grads[1]).norm() < 0.1 * grads[0].norm()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"curvature": "hessian"}, "--form example is of tr.G., and --curvature is hessian"),
        ({"compile": True}, "--form example reads the graph .* --compile"),
    ],
)
def test_what_has_no_examples_is_refused(tmp_path, settings, problem):
    with pytest.raises(ConfigError, match=problem):
        make_run(tmp_path / "a", reg="trace", form="example", **settings)


@pytest.mark.parametrize("settings", [
    {"form": "example"},
    {"form": "example", "penalty_examples": 0.25, "every": 2},
    {"curvature": "hessian", "penalty_examples": 0.25, "model_arg": {"norm": "none", "width": 2}},
])  # fmt: skip
def test_it_trains_and_is_told(tmp_path, settings):
    settings = {"reg": "trace=0.003", "train_examples": 100, **settings}
    run = train_to_end(tmp_path / "a", **settings)
    said = run.finish()["trace_penalty"]
    assert said["penalty_examples"] == settings.get("penalty_examples", 1.0)
    if run.config.curvature != "hessian":
        assert said["form_reason"].endswith("tensors by example; 2 in closed form")
