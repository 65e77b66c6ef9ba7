"""Every regularizer against its formula on paper, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.config import REGULARIZERS, TrainConfig, parse_regularizers
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.distributed.parallel import ALONE
from hesstrace_cli.errors import ConfigError, ModelError
from hesstrace_cli.regularizers import Part, Setting, Step, build
from tests.curvature import oracles
from tests.curvature.zoo import make

CONFIG = TrainConfig(warmup=0.0, num_classes=3, curvature="ggn", estimator="hutchinson")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def the(name, strength, **settings):
    (regularizer,) = build({name: strength}, dataclasses.replace(CONFIG, **settings))
    if name == "mixup":
        model, X, y = make("gelu", train=True)
        objective = Objective(model, trainable(model))
        regularizer.prepare(Setting(objective, X, y, len(X), 3, 10, ALONE))
    return regularizer


def step_of(regularizer, case="gelu", seed=0, objective=None):
    model, X, y = make(case, train=True)
    objective = objective or Objective(model, trainable(model))
    X, _ = regularizer.transform(X, y, generator())
    logits = objective.model(X)
    loss = objective.task.loss(logits, y)
    whole = Part(torch.arange(len(X)), len(X), 1.0, len(X), 1.0)
    draws = generator(seed)
    return Step(objective, X, y, logits, loss, whole, 0, 0.5, draws, draws.get_state())


def moved(objective, shift):
    """A copy of the model's loss at w + shift, by moving the weights themselves."""
    with torch.no_grad():
        for name, p in objective.params.items():
            p.add_(shift[name])


def flat_gradient(value, objective):
    grads = torch.autograd.grad(
        value, list(objective.params.values()), retain_graph=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in grads])


def test_jacobian():
    penalty = the("jacobian", 0.3)
    step = step_of(penalty)
    J = torch.autograd.functional.jacobian(
        lambda X: step.objective.model(X).sum(0), step.X, create_graph=False
    )  # (C, N, d): examples are independent of each other
    truth = J.square().sum() / len(step.X) / 2
    values = torch.stack([penalty.term(step_of(penalty, seed=s)).value for s in range(800)])
    assert penalty.term(step).weight == 0.3
    assert abs(values.mean() - truth) < 4 * values.std() / 800**0.5
    assert flat_gradient(penalty.term(step).value, step.objective).any()


def test_confidence():
    penalty = the("confidence", 0.3)
    step = step_of(penalty)
    p = F.softmax(step.outputs, 1)
    entropy = -(p * p.log()).sum(1).mean()
    term = penalty.term(step)
    torch.testing.assert_close(term.weight * term.value, -0.3 * entropy)


def test_label_smoothing():
    regularizer = the("label-smoothing", 0.3)
    step = step_of(regularizer)
    model, _, _ = make("gelu", train=True)
    smoothed = regularizer.attach(Objective(model, trainable(model))).task.loss
    target = 0.7 * F.one_hot(step.targets, 3) + 0.1
    by_hand = -(target * F.log_softmax(step.outputs, 1)).sum(1).mean()
    torch.testing.assert_close(smoothed(step.outputs, step.targets), by_hand)


def test_cutout():
    cutout, X = the("cutout", 4), torch.ones(2000, 2, 10, 12)
    erased, y = cutout.transform(X, torch.arange(2000), generator())
    holes = erased == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    assert torch.equal(y, torch.arange(2000))
    rows, columns = holes[:, 0].any(2), holes[:, 0].any(1)
    assert torch.equal(holes[:, 0], rows[:, :, None] & columns[:, None, :])  # one rectangle
    assert rows.sum(1).max() == 4
    assert columns.sum(1).min() == 2  # half of it beyond the border
    # A side of 4 at a uniform centre covers (4 + 4 + ... + 3 + 2 + 3) / n rows on average.
    assert abs(rows.sum(1).float().mean() - (4 * 10 - 2 - 1 - 1) / 10) < 0.1
    assert (X == 1).all()
    with pytest.raises(ConfigError, match="cutout=13"):
        the("cutout", 13).transform(X, y, generator())


def test_mixup():
    mixup, X, y = the("mixup", 0.4), torch.eye(3), torch.arange(3)
    shares = []
    for seed in range(1500):
        mixed, targets = mixup.transform(X, y, generator(seed))
        torch.testing.assert_close(mixed, targets)  # inputs and targets are mixed alike
        torch.testing.assert_close(mixed.sum(1), torch.ones(3))
        shares.append(mixed[0, 0].item())
    off = torch.tensor([s for s in shares if s != 1.0])
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    assert abs(off.mean() - 0.5) < 0.05
    assert abs(off.var() - 1 / (4 * 1.8)) < 0.02
    soft = mixup.transform(X, F.one_hot(y, 3).float(), generator())
    torch.testing.assert_close(soft, mixup.transform(X, y, generator()))


def test_dropout():
    model = nn.Sequential(nn.Linear(3, 400), nn.Linear(400, 2, bias=False))
    nn.init.ones_(model[1].weight)
    X = torch.randn(5, 3)
    plain = model(X)
    the("dropout", 0.25).attach(Objective(model, trainable(model)))
    assert torch.equal(model.eval()(X), plain)
    model.train()
    nn.init.ones_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    kept = model(torch.ones(1, 3)) / (3 / 0.75)  # each feature is 3, scaled by 1 / .75
    assert abs(kept[0, 0].item() / 400 - 0.75) < 0.1
    without = nn.Conv2d(1, 1, 1)
    with pytest.raises(ModelError, match="Linear"):
        the("dropout", 0.1).attach(Objective(without, trainable(without)))


@pytest.mark.parametrize("case", ["gelu", "batch_norm_1d"])
def test_sam(case):
    sam = the("sam", 0.2)
    step = step_of(sam, case)
    term = sam.term(step)
    assert term.replaces
    objective = step.objective
    slope = flat_gradient(term.value, objective)
    g = flat_gradient(step.loss, objective)
    moved(objective, oracles.unflatten(0.2 * g / g.norm(), objective.params))
    at = F.cross_entropy(objective.model(step.X), step.targets)
    torch.testing.assert_close(term.value, at)
    torch.testing.assert_close(slope, flat_gradient(at, objective))


class Ascent:
    """ASAM as an optimizer that moves the weights up, lets the gradient be taken, and moves back.

    Eta is added to every parameter's size; the step is rho T^2 g / ||T g||.
    """

    def __init__(self, params, rho, eta=0.01):
        self.params, self.rho, self.eta = list(params), rho, eta

    @torch.no_grad()
    def up(self):
        scaled = [p.grad * (p.abs() + self.eta) for p in self.params]
        norm = sum(float((s * s).sum()) for s in scaled) ** 0.5
        self.steps = [
            self.rho / norm * s * (p.abs() + self.eta)
            for s, p in zip(scaled, self.params, strict=True)
        ]
        for p, e in zip(self.params, self.steps, strict=True):
            p += e

    @torch.no_grad()
    def back(self):
        for p, e in zip(self.params, self.steps, strict=True):
            p -= e


@pytest.mark.parametrize("case", ["gelu", "batch_norm_1d"])
def test_asam(case):
    asam = the("asam", 0.2)
    step = step_of(asam, case)
    term, objective = asam.term(step), step.objective
    slope = flat_gradient(term.value, objective)
    # The formula: the worst point of ||T^-1 e|| <= rho for a loss that is linear there.
    g, w = flat_gradient(step.loss, objective), oracles.flatten(objective.params).detach()
    T = torch.diag(w.abs() + 0.01)
    e = oracles.flatten(asam.ascent(
        {n: p.clone() for n, p in oracles.unflatten(g, objective.params).items()},
        objective.params))  # fmt: skip
    torch.testing.assert_close(e, 0.2 * T @ T @ g / (T @ g).norm())
    assert torch.linalg.solve(T, e).norm() == pytest.approx(0.2)
    # The second implementation.
    for name, p in objective.params.items():
        p.grad = oracles.unflatten(g, objective.params)[name].clone()
    ascent = Ascent(objective.params.values(), 0.2)
    ascent.up()
    at = F.cross_entropy(objective.model(step.X), step.targets)
    expected = flat_gradient(at, objective)
    ascent.back()
    torch.testing.assert_close(term.value, at)
    torch.testing.assert_close(slope, expected)
    assert term.replaces


def test_asam_is_of_no_scale():
    """A layer scaled up and the next one down: the same loss at the worst point, but for eta."""
    torch.manual_seed(0)
    body = [nn.Linear(4, 20, bias=False), nn.ReLU(), nn.Linear(20, 3, bias=False)]
    model, rises = nn.Sequential(*body).double(), {"sam": [], "asam": []}
    X, y = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3
    for _ in range(2):
        for name, own in rises.items():
            objective = Objective(model, trainable(model))
            logits = model(X)
            loss = F.cross_entropy(logits, y)
            whole, draws = Part(torch.arange(30), 30, 1.0, 30, 1.0), generator()
            step = Step(objective, X, y, logits, loss, whole, 0, 0.5, draws, draws.get_state())
            own.append((the(name, 0.1).term(step).value - loss).item())
        with torch.no_grad():
            body[0].weight.mul_(3)
            body[2].weight.div_(3)
    assert rises["asam"][1] == pytest.approx(rises["asam"][0], rel=0.1)
    assert rises["sam"][1] > 1.5 * rises["sam"][0]


def test_nso():
    nso = the("nso", 1e-3)
    step = step_of(nso)
    objective = step.objective
    H = oracles.dense_hessian(objective, step.X, step.targets)
    truth = 1e-6 / 2 * H.trace()
    rises = []
    for seed in range(800):
        step = dataclasses.replace(step, generator=generator(seed))
        rises.append((nso.term(step).value - step.loss).item())
    rises = torch.tensor(rises)
    assert nso.term(step).replaces
    assert abs(rises.mean() - truth) < 4 * rises.std() / 800**0.5


@pytest.mark.parametrize("case", ["gelu", "batch_norm_1d", "layer_norm"])
def test_grad_norm(case):
    penalty = the("grad-norm", 0.3)
    step = step_of(penalty, case)
    objective, value = step.objective, penalty.term(step).value
    torch.testing.assert_close(value, flat_gradient(step.loss, objective).norm())
    w = oracles.flatten(objective.params)
    u = torch.randn(w.shape, generator=generator(3), dtype=w.dtype)
    slope = flat_gradient(value, objective) @ u

    def norm_at(flat):
        values = oracles.unflatten(flat, objective.params)
        values = {name: v.detach().requires_grad_() for name, v in values.items()}
        buffers = {n: b.clone() for n, b in objective.model.named_buffers()}
        logits = torch.func.functional_call(objective.model, {**values, **buffers}, (step.X,))
        grads = torch.autograd.grad(F.cross_entropy(logits, step.targets), list(values.values()))
        return torch.cat([g.flatten() for g in grads]).norm()

    truth = oracles.first_difference(norm_at, w, u)
    torch.testing.assert_close(slope, truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("case", ["gelu", "batch_norm_1d", "layer_norm"])
def test_grad_norm_by_differences(case):
    penalty = the("grad-norm-fd", 0.3, fd_step=0.2)
    step = step_of(penalty, case)
    objective, term = step.objective, penalty.term(step)
    slope, g = flat_gradient(term.value, objective), flat_gradient(step.loss, objective)
    # The second implementation: the weights themselves moved up the gradient.
    moved(objective, oracles.unflatten(0.2 * g, objective.params))
    above = F.cross_entropy(objective.model(step.X), step.targets)
    expected = (flat_gradient(above, objective) - g) / 0.2
    moved(objective, oracles.unflatten(-0.2 * g, objective.params))
    assert term.weight == 0.3
    assert not term.replaces
    torch.testing.assert_close(term.value, (above - step.loss) / 0.2)
    torch.testing.assert_close(slope, expected)
    # The formula, for a short step: H g, the gradient of ||g||^2 / 2, which grad-norm has exactly.
    short = dataclasses.replace(CONFIG, fd_step=1e-7)
    (penalty,) = build({"grad-norm-fd": 0.3}, short)
    value = penalty.term(step_of(penalty, case, objective=objective)).value
    exact = the("grad-norm", 0.3)
    norm = exact.term(step_of(exact, case, objective=objective)).value
    half = flat_gradient(norm.square() / 2, objective)
    torch.testing.assert_close(flat_gradient(value, objective), half, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value, norm.square(), rtol=1e-4, atol=1e-8)


def test_a_step_lost_in_rounding_is_refused():
    """Its weight over the step takes the digits of the loss's own gradient, too."""
    model, X, y = make("gelu", train=True)
    for dtype, least in ((torch.float32, 4e-5), (torch.float64, 2e-9)):
        objective = Objective(model.to(dtype), trainable(model))
        setting = Setting(objective, X.to(dtype), y, len(X), 3, 10, ALONE)
        the("grad-norm-fd", 0.1, fd_step=least).prepare(setting)
        with pytest.raises(ConfigError, match=f"lost in the rounding of {str(dtype)[6:]}"):
            the("grad-norm-fd", 0.1, fd_step=least / 4).prepare(setting)


@pytest.mark.parametrize("case", ["gelu", "batch_norm_1d"])
def test_fisher(case):
    """The squared gradient of the cross-entropy with labels drawn from the model, in its words."""
    penalty = the("trace", 0.3, form="batch", draw="labels")
    step = step_of(penalty, case, seed=4)
    objective, value = step.objective, penalty.term(step).value
    noise = torch.empty_like(step.outputs).uniform_(generator=step.shared_generator())
    labels = (step.outputs - (-noise.log()).log()).argmax(1)
    assert not torch.equal(labels, step.outputs.argmax(1))
    w = oracles.flatten(objective.params)
    u = torch.randn(w.shape, generator=generator(3), dtype=w.dtype)

    def penalty_at(flat):
        values = oracles.unflatten(flat, objective.params)
        values = {name: v.detach().requires_grad_() for name, v in values.items()}
        buffers = {n: b.clone() for n, b in objective.model.named_buffers()}
        logits = torch.func.functional_call(objective.model, {**values, **buffers}, (step.X,))
        loss = F.cross_entropy(logits, labels)
        grads = torch.autograd.grad(loss, list(values.values()))
        return len(labels) * sum(g.square().sum() for g in grads)

    torch.testing.assert_close(value, penalty_at(w.detach()))
    slope, truth = flat_gradient(value, objective) @ u, oracles.first_difference(penalty_at, w, u)
    torch.testing.assert_close(slope, truth, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_strength_zero_is_left_out_and_defaults_are_documented(name):
    assert build({name: 0.0}, CONFIG) == []
    assert parse_regularizers([name], None) == {name: REGULARIZERS[name].default}
    assert build({name: REGULARIZERS[name].default}, CONFIG)
    assert REGULARIZERS[name].unit


def test_sam_and_nso_exclude_each_other():
    for pair in (["sam=0.1", "nso=0.1"], ["asam,sam"]):
        with pytest.raises(ConfigError, match="both stand in the place of the loss"):
            parse_regularizers(pair, None)


def test_a_users_class_declares_its_strength(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "raise RuntimeError('imported')\n"
        "class A:\n    default = 0.3\n    maximum = 1\n    is_penalty = False\nclass B:\n    pass\n"
    )
    assert parse_regularizers([f"{file}:A"], None) == {f"{file}:A": 0.3}
    with pytest.raises(ConfigError, match="at most 1"):
        parse_regularizers([f"{file}:A=2"], None)
    with pytest.raises(ConfigError, match="--lambda is given"):
        parse_regularizers([f"{file}:A"], 0.1)
    with pytest.raises(ConfigError, match="no default strength"):
        parse_regularizers([f"{file}:B"], None)
    assert parse_regularizers([f"{file}:B"], 0.1) == {f"{file}:B": 0.1}
