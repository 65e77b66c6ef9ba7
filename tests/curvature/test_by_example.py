"""The penalty by example: value and gradient against per-example autograd, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from hesstrace_cli.autodiff.calls import outputs_of, trainable
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.by_example import ByExample
from hesstrace_cli.curvature.probes import Draws, balanced_signs, draw_signs
from hesstrace_cli.curvature.trace_penalty import batch_samples
from tests.curvature.test_exact import SHAPES, build
from tests.curvature.zoo import make


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def forward(objective, X):
    with differentiable_ops(order=2, by_example=True):
        return outputs_of(objective.model(X))


def truthful(objective, X):
    """The same from primitive operations, of which every derivative is right."""
    return objective.outputs(objective.params, X)


def per_example_truth(outputs, objective, y, keep, signs, whole=()):
    """(1/M) sum_i ||s J_i^T u_i||^2, each example differentiated by itself."""
    task, names = objective.task, list(objective.params)
    u = task.root(outputs, y, signs)
    total, sums = 0, {}
    for i in range(len(outputs)):
        only = torch.zeros_like(u)
        only[i] = 1
        grads = torch.autograd.grad(
            outputs, list(objective.params.values()), u * only, create_graph=True,
            materialize_grads=True,
        )  # fmt: skip
        for name, g in zip(names, grads, strict=True):
            if name in whole:
                sums[name] = sums.get(name, 0) + g
            elif name in keep:
                total = total + (keep[name] * g).square().sum()
    total = total + sum((keep[n] * g).square().sum() for n, g in sums.items() if n in keep)
    return total / task.num_terms(y)


def assert_same(value, truth, params, rtol=1e-9):
    torch.testing.assert_close(value, truth, rtol=rtol, atol=1e-12)
    own, true = gradient(value, params), gradient(truth, params)
    for name in params:
        torch.testing.assert_close(own[name], true[name], rtol=rtol, atol=1e-11, msg=name)


@pytest.mark.parametrize("scheme", ["none", "tensor", "entry"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_rule_and_its_derivative(name, scheme, monkeypatch):
    monkeypatch.setattr(
        "hesstrace_cli.curvature.per_example.by_example.output_layer", lambda *_: {}
    )
    objective, X, y = build(SHAPES[name])
    draws = Draws(scheme=scheme, keep_prob=0.6)
    outputs = forward(objective, X)
    form = ByExample()
    (value,) = form.samples(
        outputs, objective.params, objective.task, y, draws=draws, generator=generator()
    )
    draw = generator()
    keep = draws.keep(objective.params, draw)
    signs = draw_signs(outputs, draw, balanced=True)
    whole = [name for name, way in form.ways.items() if way.kind == "batch"]
    if scheme == "entry" and "table" in name:  # a gradient would have to be made
        whole.append("table")
    truth = per_example_truth(truthful(objective, X), objective, y, keep, signs, whole)
    assert_same(value, truth, objective.params)


HALVES = ["transformer", "embedding", "depthwise", "group_norm", "batch_norm_2d", "sequence first",
          "conv1d, stride, dilation", "conv_transpose, groups", "tokens and positions"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALVES)
def test_in_half_precision_rules_are_as_right_as_autograd(name, dtype, monkeypatch):
    """Every example differentiated through the same graph, whose rounding is then the same."""
    monkeypatch.setattr(
        "hesstrace_cli.curvature.per_example.by_example.output_layer", lambda *_: {}
    )
    objective, X, y = build(SHAPES[name])
    objective.model.float()
    params = objective.params
    with torch.autocast("cpu", dtype):
        outputs = forward(objective, X.float()).float()
    form = ByExample()
    (value,) = form.samples(
        outputs, params, objective.task, y, draws=Draws(scheme="none"), generator=generator()
    )  # fmt: skip
    whole = [n for n, way in form.ways.items() if way.kind == "batch"]
    assert whole == (["token"] if name == "tokens and positions" else [])
    keep, signs = (
        {n: torch.ones(()) for n in params},
        draw_signs(outputs, generator(), balanced=True),
    )
    truth = per_example_truth(outputs, objective, y, keep, signs, whole)
    torch.testing.assert_close(value, truth, rtol=0.02, atol=1e-6)
    own, true = gradient(value, params), gradient(truth, params)
    size = max(g.norm() for g in true.values())
    for n, g in true.items():
        assert (own[n] - g).norm() <= 0.03 * g.norm() + 1e-3 * size, n


def test_over_all_signs_both_forms_are_equal(monkeypatch):
    """The mean over all signs of value and gradient, the output layer in closed form."""
    objective, X, y = build(SHAPES["group_norm"])
    X, y = X[:2], y[:2]
    outputs = forward(objective, X)
    form, draws = ByExample(), Draws(scheme="none")
    found = {"example": [], "batch": []}
    every = itertools.product((-1.0, 1.0), repeat=outputs.numel())
    signs = [torch.tensor(each, dtype=outputs.dtype).view_as(outputs) for each in every]
    remaining = iter([each for each in signs for _ in found])
    for module in ("per_example.by_example", "probes"):
        name = f"hesstrace_cli.curvature.{module}.draw_signs"
        monkeypatch.setattr(name, lambda *_, **__: next(remaining))
    for _ in signs:
        given = (outputs, objective.params, objective.task, y)
        found["example"] += form.samples(*given, draws=draws, generator=generator())
        found["batch"] += batch_samples(*given, draws=draws, generator=generator())
    assert {way.kind for way in form.ways.values()} == {"example", "closed"}
    means = {name: torch.stack(values).mean() for name, values in found.items()}
    assert_same(means["example"], means["batch"], objective.params, rtol=1e-12)
    spread = {name: torch.stack(values).std() for name, values in found.items()}
    assert spread["example"] < spread["batch"] / 3


class Statistics(TorchFunctionMode):
    """Batch norms from primitives, the statistics of one pass given to the next."""

    def __init__(self):
        super().__init__()
        self.found, self.given = [], None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        X, _, _, weight, bias, training, _, eps = args[:8] if len(args) > 7 else (
            args[0], *args[1:3], kwargs.get("weight"), kwargs.get("bias"), kwargs["training"],
            kwargs["momentum"], kwargs["eps"],
        )  # fmt: skip
        assert training
        dims, shape = [0, *range(2, X.dim())], (1, -1, *[1] * (X.dim() - 2))
        if self.given is None:
            pair = X.mean(dims), (X.var(dims, unbiased=False) + eps).rsqrt()
            self.found.append(pair)
        else:
            pair = self.given.pop(0)
        Y = (X - pair[0].reshape(shape)) * pair[1].reshape(shape)
        return Y * weight.reshape(shape) + bias.reshape(shape)


def truth_with_held_statistics(objective, X, y, keep, signs):
    """The same with J_i of the network whose batch statistics are constants, known by w alone."""
    with Statistics() as mode:
        functional_call(objective.model, objective.params, (X,))
        mode.given = mode.found
        copies = {n: p.clone() for n, p in objective.params.items()}
        outputs = functional_call(objective.model, copies, (X,))
    own = Objective(objective.model, copies)
    return per_example_truth(outputs, own, y, keep, signs)


class Deep(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 4, 2, padding=1), nn.BatchNorm2d(4), nn.Tanh(),
            nn.Conv2d(4, 3, 2, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(),
            nn.Linear(12, 3),
        )  # fmt: skip

    def forward(self, X):
        return super().forward(X.reshape(-1, 2, 2, 2))


BATCH_NORMS = {
    "1d": lambda: make("batch_norm_1d", train=True)[0],
    "2d": lambda: make("batch_norm_2d", train=True)[0],
    "deep": Deep,
}


@pytest.mark.parametrize("scheme", ["none", "tensor", "entry"])
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_statistics_are_held_inside_and_move_outside(name, scheme):
    objective, X, y = build(BATCH_NORMS[name])
    objective.model.train()
    draws, form = Draws(scheme=scheme, keep_prob=0.6), ByExample()
    (value,) = form.samples(
        forward(objective, X), objective.params, objective.task, y, draws=draws,
        generator=generator(),
    )  # fmt: skip
    assert {way.kind for way in form.ways.values()} == {"example", "closed"}
    closed = [n for n, way in form.ways.items() if way.kind == "closed"]
    draw = generator()
    keep = draws.keep({n: p for n, p in objective.params.items() if n not in closed}, draw)
    signs = draw_signs(y.new_empty((6, 3), dtype=torch.float64), draw, balanced=True)
    truth = truth_with_held_statistics(objective, X, y, keep, signs)
    truth = truth + closed_truth(objective, X, y)
    assert_same(value, truth, objective.params)


@pytest.mark.parametrize(("N", "num_classes"), [(4, 3), (3, 3), (9, 4), (2, 9), (5, 1)])
def test_balanced_signs_have_the_moments_of_independent_ones(N, num_classes):
    """E[e_ia e_jb] = 1 where i = j and a = b, and 0 elsewhere: both forms are unbiased."""
    draw, like = generator(), torch.empty(N, num_classes, dtype=torch.float64)
    signs = torch.stack([balanced_signs(like, generator=draw) for _ in range(4000)]).flatten(1)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    moments = signs.T @ signs / len(signs)
    error = moments - torch.eye(len(moments), dtype=torch.float64)
    assert error.abs().max() < 4.5 / len(signs) ** 0.5
    assert signs.mean(0).abs().max() < 4.5 / len(signs) ** 0.5
    more = balanced_signs(like.new_empty(N + 7, num_classes), generator=generator())
    assert torch.equal(more[:N], balanced_signs(like, generator=generator()))
    square = balanced_signs(like.new_empty(16, 16), generator=draw)
    torch.testing.assert_close(square.T @ square, 16 * torch.eye(16, dtype=torch.float64))


def test_what_examples_have_in_common_comes_without_noise():
    """Four examples that are the same one: every draw gives tr(G) and its gradient."""
    objective, X, y = build(SHAPES["group_norm"])
    alone = forward(objective, X[:1])
    p = F.softmax(alone[0], 0)
    root = p.sqrt().diag() - p[:, None] * p.sqrt()
    truth = sum(
        g.square().sum()
        for vector in root.T[:, None]
        for g in torch.autograd.grad(
            alone, list(objective.params.values()), vector, create_graph=True
        )
    )
    outputs, form, draw = (
        forward(objective, X[:1].expand(4, *X.shape[1:])),
        ByExample(),
        generator(),
    )
    given = (outputs, objective.params, objective.task, y[:1].expand(4))
    samples = [form.samples(*given, draws=Draws(), generator=draw)[0] for _ in range(3)]
    for sample in samples:
        assert_same(sample, truth, objective.params, rtol=1e-11)


def closed_truth(objective, X, y):
    """The head's block from its input, written out."""
    head, seen = [m for m in objective.model.modules() if isinstance(m, nn.Linear)][-1], []
    handle = head.register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    p = F.softmax(truthful(objective, X), 1)
    handle.remove()
    return ((seen[0].square().sum(1) + 1) * (1 - p.square().sum(1))).mean()


def test_elsewhere_the_kernel_has_its_own_derivatives():
    """The whole-batch form through the same forward pass, to the bit."""
    model, X, y = make("batch_norm_2d", train=True)
    params, found = trainable(model), []
    for by_example in (False, True):
        with differentiable_ops(order=2, by_example=by_example):
            outputs = model(X)
        loss = F.cross_entropy(outputs, y)
        first = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        square = sum(g.square().sum() for g in first)
        found.append([*first, *torch.autograd.grad(loss + square, list(params.values()))])
    for native, own in zip(*found, strict=True):
        assert torch.equal(native, own)
