"""Loops that do what no example does: a right number, or a line that says why not."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

from hesstrace_cli import TracePenalty, differentiable, estimate_trace
from hesstrace_cli.analysis.estimation import estimate
from hesstrace_cli.api.batches import open_loader
from hesstrace_cli.autodiff.calls import trainable
from hesstrace_cli.config import EstimateConfig
from hesstrace_cli.errors import DataError, DerivativeError, ModelError
from tests.api.test_penalty import (
    AllDraws,
    D,
    N,
    Small,
    X,
    Y,
    filled,
    gradient,
    normal,
    penalised,
    refused,
)

ALL = {"estimator": "hutchinson"}


def recorded(model, inputs=X):
    with differentiable():
        return model(inputs)


def dense_trace(outputs_of, params):
    """tr(G) = (1/M) sum_m tr(J_m^T A_m J_m) of a softmax, by Jacobians of plain operations."""
    logits, of = outputs_of(params), jacrev(outputs_of)(params)
    J = torch.cat([j.flatten(2) for j in of.values()], 2)
    p = F.softmax(logits, 1)
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("mkp,mkl,mlp->", J, A, J) / len(logits)


def holds(monkeypatch, model, penalty, sample, outputs_of, size=64):
    """Mean value and gradient of `sample()` over all signs are those of the dense trace."""
    params = {n: p.detach().clone().requires_grad_() for n, p in trainable(model).items()}
    truth = dense_trace(outputs_of, params)
    expected = torch.cat([
        g.flatten()
        for g in torch.autograd.grad(truth, list(params.values()), materialize_grads=True)
    ])  # fmt: skip

    def draw():
        value = sample()
        penalty.step()
        return torch.cat([value.detach()[None], gradient(model, value)])

    with monkeypatch.context() as patch:
        mean = AllDraws(patch, size).mean(draw)
    torch.testing.assert_close(mean[0], truth.detach())
    torch.testing.assert_close(mean[1:], expected)


def plain(model, inputs=X):
    return lambda params: functional_call(model, params, inputs)


# -- what is done with outputs


def flipped(outputs):
    return outputs + 0.5 * outputs.flip(0)


BEHIND = {
    "temperature": lambda outputs: outputs / 3,
    "log-softmax": lambda outputs: F.log_softmax(outputs, 1),
    "examples touch": flipped,
    "permuted": lambda outputs: outputs[[3, 1, 0, 2]],
}


@pytest.mark.parametrize("form", ["batch", "example"])
@pytest.mark.parametrize("name", BEHIND)
def test_what_the_loop_does_to_outputs_is_seen(name, form, monkeypatch):
    model, behind = filled(Small(norm=False)), BEHIND[name]
    for first in (behind, lambda outputs: outputs):  # from the first step on, or later
        penalty = TracePenalty(model, 1.0, form=form, **ALL)
        penalty(first(recorded(model)), Y)
        penalty.step()
        holds(
            monkeypatch, model, penalty, lambda p=penalty: p(behind(recorded(model)), Y),
            lambda params: behind(functional_call(model, params, X)),
        )  # fmt: skip


class Centered(nn.Module):
    def forward(self, h):
        return h - 0.5 * h.mean(0)


def test_examples_that_touch_each_other_later_only(monkeypatch):
    model = filled(Small(norm=False))
    penalty = TracePenalty(model, 1.0, form="example", **ALL)
    penalty(recorded(model), Y)
    penalty.step()
    model.norm = Centered()
    holds(monkeypatch, model, penalty, lambda: penalty(recorded(model), Y), plain(model))


def test_some_rows_and_rows_of_two_calls(monkeypatch):
    model, others = filled(Small(norm=False)), normal(7, D, seed=8)
    twice = torch.cat([Y, Y[:2]])

    def several():
        return torch.cat([recorded(model), recorded(model, others[:2])])

    samples = {
        "some": (lambda: recorded(model)[:2], Y[:2], lambda f, p: f(p)[:2]),
        "two calls": (several, twice, lambda f, p: torch.cat([f(p), plain(model, others[:2])(p)])),
        "another call after it": (
            lambda: (recorded(model), model(others))[0], Y, lambda f, p: f(p)
        ),
    }  # fmt: skip
    for outputs, y, of in samples.values():
        penalty = TracePenalty(model, 1.0, form="example", **ALL)
        penalty(outputs(), y)
        penalty.step()
        holds(
            monkeypatch, model, penalty, lambda outputs=outputs, p=penalty, y=y: p(outputs(), y),
            lambda p, of=of: of(plain(model), p),
        )  # fmt: skip


def test_outputs_of_other_weights_are_refused():
    model, other = filled(Small()), filled(Small(), 1)
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    penalty = TracePenalty(model, 1.0)
    for _ in range(2):  # before the first step and after it
        refused(lambda: penalty(functional_call(model, weights, X), Y), ModelError, "parameters")
        model(X)
        refused(lambda: penalty(other(X), Y), ModelError, "do not depend on the model")
        penalty(recorded(model), Y)


def test_probabilities_are_not_taken_for_logits():
    softmax = filled(nn.Sequential(Small(), nn.Softmax(1)))
    sigmoid = filled(nn.Sequential(Small(), nn.Sigmoid()))
    labels = F.one_hot(Y).double()
    model = filled(Small())
    penalty = TracePenalty(model, 1.0)
    refused(lambda: penalty(model(X).softmax(1), Y), ModelError, "logits", "softmax")
    refused(lambda: TracePenalty(softmax, 1.0).loss(X, Y), ModelError, "logits", "softmax")
    refused(lambda: estimate_trace(softmax, [(X, Y)]), ModelError, "logits", "softmax")
    refused(
        lambda: TracePenalty(sigmoid, 1.0, task="multilabel").loss(X, labels), ModelError, "sigmoid"
    )
    refused(
        lambda: estimate_trace(sigmoid, [(X, labels)], task="multilabel"), ModelError, "sigmoid"
    )


def test_what_comes_later_is_looked_at_too():
    model = filled(Small())
    penalty = TracePenalty(model, 1.0)
    refused(lambda: penalty(recorded(model, X[:0]), Y[:0]), DataError, "no example")
    penalty(recorded(model), Y)
    refused(lambda: penalty(recorded(model), Y[:2]), ModelError, "(4, 2)", "(2,)")
    refused(lambda: penalty(recorded(model), Y.double()), ModelError, "float64")
    refused(lambda: penalty(recorded(model, X[:0]), Y[:0]), DataError, "no example")
    outputs = recorded(model)
    F.cross_entropy(outputs, Y).backward()
    refused(lambda: penalty(outputs, Y), ModelError, "before loss.backward()")
    model.second = nn.Sequential(model.second, nn.Hardsigmoid())
    with pytest.raises(DerivativeError, match=r"outside hesstrace_cli.differentiable\(\)"):
        penalty(model(X), Y)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_off_change_nothing(context):
    model = filled(Small())
    for first in (True, False):  # before the first step and after it
        penalty = TracePenalty(model, 1.0)
        outputs, again = recorded(model), recorded(model)
        if not first:
            penalty(outputs, Y)
        penalty._seen = 0
        with context():
            value = penalty(outputs, Y)
        penalty._seen = 0
        torch.testing.assert_close(gradient(model, value), gradient(model, penalty(again, Y)))


@pytest.mark.parametrize("method", ["hutchinson", "auto", "xtrace"])
def test_hooks_on_gradients_are_no_part_of_an_estimate(method):
    """By the commands' own function too."""
    model = filled(Small())
    data, config = open_loader(model, [(X, Y)], "auto"), EstimateConfig(method=method)
    before = estimate(model, data, config).value
    model.first.weight.register_hook(lambda g: 3 * g)
    assert estimate(model, data, config).value == before
    assert model.first.weight._backward_hooks


def test_hooks_on_gradients_are_for_the_whole_loss(monkeypatch):
    """As the mask of a pruned weight, or a clip."""
    model, calls = filled(Small(norm=False)), []

    def register():
        return model.first.weight.register_hook(lambda g: calls.append(1) or 3 * g)

    expected = estimate_trace(model, [(X, Y)], method="hutchinson").value
    handle = register()
    assert estimate_trace(model, [(X, Y)], method="hutchinson").value == expected
    penalty = TracePenalty(model, 1.0, **ALL)
    loss = penalty(recorded(model), Y)
    assert not calls
    loss.backward()
    assert len(calls) == 1
    penalty.step()
    of_h = TracePenalty(model, 1.0, curvature="hessian")
    of_h.loss(X, Y)
    assert len(calls) == 1
    handle.remove()

    def sample():
        handle = register()
        value = penalty(recorded(model), Y)
        handle.remove()  # so that the gradient is that of the penalty
        return value

    holds(monkeypatch, model, penalty, sample, plain(model))


# -- what is done with the model


def test_a_model_in_double_precision_later_and_other_parameters(monkeypatch):
    model = filled(Small(norm=False)).float()
    penalty = TracePenalty(model, 1.0, **ALL)
    penalty(recorded(model, X.float()), Y)
    model.double()
    model.first.requires_grad_(False)
    penalty(recorded(model), Y)
    penalty.step()
    model.second = filled(nn.Linear(3, 3), 2)
    holds(monkeypatch, model, penalty, lambda: penalty(recorded(model), Y), plain(model))


class Held(nn.Module):
    """As a LightningModule that makes the penalty of itself."""

    def __init__(self):
        super().__init__()
        self.net = Small()
        self.penalty = TracePenalty(self, 1.0)

    def forward(self, X):
        return self.net(X)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("steps", [0, 1])
def test_copies_of_the_penalty_go_on_by_themselves(copied, steps):
    model = filled(Held())
    for _ in range(steps):
        model.penalty(recorded(model), Y)
        model.penalty.step()
    other = copied(model)
    assert other.penalty.model is other
    values = [each.penalty(recorded(each), Y) for each in (model, other)]
    assert values[0] == values[1]


def test_a_forgotten_step_is_said_and_sam_and_lbfgs_are_not():
    def moves(times):
        model = filled(Small())
        penalty = TracePenalty(model, 1.0)
        for _ in range(times):
            penalised(model, penalty, X, Y)
            with torch.no_grad():
                model.first.weight.mul_(0.99)
        return penalty

    with pytest.warns(UserWarning, match=r"penalty.step\(\)") as caught:
        moves(40)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moves(20).step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_part_that_is_compiled_is_run_as_it_is_written():
    model = filled(Small())
    expected = estimate_trace(model, [(X, Y)], method="hutchinson").value
    grads = [
        gradient(model, TracePenalty(model, 1.0, curvature=c).loss(X, Y))
        for c in ("ggn", "hessian")
    ]
    torch._dynamo.reset()
    model.first = torch.compile(model.first, backend="aot_eager")
    assert estimate_trace(model, [(X, Y)], method="hutchinson").value == expected
    for own, curvature in zip(grads, ("ggn", "hessian"), strict=True):
        penalty = TracePenalty(model, 1.0, curvature=curvature)
        torch.testing.assert_close(gradient(model, penalty.loss(X, Y)), own)
    with pytest.raises(DerivativeError, match="compiled code"):
        TracePenalty(model, 1.0)(model(X), Y)


# -- estimates


def test_a_loader_leaves_the_random_state_as_it_is():
    model, before = filled(Small()), torch.get_rng_state()
    estimate_trace(model, DataLoader(TensorDataset(X, Y), batch_size=2))
    assert torch.equal(before, torch.get_rng_state())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.calls = Small(), 0

    def forward(self, X):
        self.calls += 1
        return self.net(X) * (1 + 0.01 * self.calls)


class WithOwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Small()

    def forward(self, X, labels=None):
        logits = self.net(X)
        loss = None if labels is None else F.cross_entropy(logits, labels, label_smoothing=0.1)
        return {"logits": logits, "loss": loss}


def test_batches_and_models_that_have_no_one_trace_are_one_line():
    model = filled(Small())
    refused(lambda: estimate_trace(model, [(X, Y), (X, Y + 5)]), DataError, "batch 1", "up to 6")
    refused(lambda: estimate_trace(model, [(X, Y.int())]), DataError, "int64")
    refused(lambda: estimate_trace(model, [(X.to("meta"), Y)]), DataError, "meta")
    refused(lambda: estimate_trace(Small().to("meta"), [(X, Y)]), ModelError, "meta")
    refused(lambda: estimate_trace(nn.Flatten(), [(X, Y)]), ModelError, "no parameter")
    refused(lambda: estimate_trace(filled(Counting()), [(X, Y)]), ModelError, "again")
    own = [{"X": X, "labels": Y}]
    refused(lambda: estimate_trace(filled(WithOwnLoss()), own), ModelError, "its loss")
    refused(lambda: TracePenalty(model, 1.0).loss(X.to("meta"), Y), DataError, "meta")
    refused(lambda: TracePenalty(model, 1.0).loss(X, normal(N)), DataError, "(N, 1)")
