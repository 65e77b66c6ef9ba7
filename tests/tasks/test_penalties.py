"""For every task, samples of the penalties and their gradients against dense derivatives.

The truth comes from the unmodified model's outputs alone: G from their dense Jacobian, H from the
loss in words; gradients along a direction by differences of these values.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hesstrace_cli.autodiff.calls import recorded_outputs, trainable
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.by_example import ByExample
from hesstrace_cli.curvature.probes import Draws, draw_signs
from hesstrace_cli.curvature.trace_penalty import batch_samples, hessian_samples
from tests.curvature.oracles import first_difference
from tests.tasks.cases import CASES, case_of, flat_params, mean_in_words, outputs_at


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def direction(case):
    w = flat_params(case)
    return torch.randn(w.shape, generator=generator(5), dtype=w.dtype)


def along(value, params, u):
    """The derivative of a sample along u, by its graph."""
    grads = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
    return (torch.cat([g.flatten() for g in grads]) @ u).item()


def blocks(case, matrix):
    """The columns of each parameter."""
    names = [name for name, _ in case.model.named_parameters()]
    sizes = [p.numel() for p in case.model.parameters()]
    return dict(zip(names, matrix.split(sizes, -1), strict=True))


def dense_sample(case, signs, kinds, held=None):
    """The sample of tr(G) with these signs as a function of all parameters in one vector.

    Args:
        case: The model, its data and task.
        signs: In the shape of the outputs.
        kinds: By parameter: "batch" for the squared norm of the sum over all examples, "example"
            for the sum of their squared norms, "closed" for the block's trace without signs.
        held: Outputs at which the curvature is taken; those of the parameters where it is None.
    """
    task, y = case.task, case.y

    def sample(flat):
        f = outputs_at(case, flat)
        J = torch.autograd.functional.jacobian(lambda w: outputs_at(case, w), flat)
        N, total, at = len(f), 0.0, f if held is None else held
        units = torch.eye(f.numel(), dtype=f.dtype).view(-1, *f.shape)
        for name, part in blocks(case, J.flatten(1, -2)).items():
            u = task.root(at, y, signs).flatten(1)
            of_examples = torch.einsum("nk,nkp->np", u, part)
            if kinds[name] == "batch":
                total += of_examples.sum(0).square().sum()
            elif kinds[name] == "example":
                total += of_examples.square().sum()
            else:
                rows = part.reshape(N * u.shape[1], -1)
                total += sum((task.root(at, y, e).flatten() @ rows).square().sum() for e in units)
        return total / task.num_terms(y)

    return sample


@pytest.mark.parametrize("form", ["batch", "example"])
@pytest.mark.parametrize("name", CASES)
def test_on_the_gauss_newton_part(name, form):
    check_on_ggn(case_of(name), form)


@pytest.mark.parametrize("form", ["batch", "example"])
@pytest.mark.parametrize("name", ["classes, tanh", "tokens, tanh", "labels, tanh"])
def test_with_the_curvature_in_the_outputs_held(name, form):
    check_on_ggn(case_of(name), form, hold=True)


def check_on_ggn(case, form, *, hold=False):
    params = trainable(case.model)
    outputs = recorded_outputs(case.model, params, case.X)
    signs = draw_signs(outputs, generator(), balanced=form == "example")
    arguments = (outputs, params, case.task, case.y)
    if form == "batch":
        kinds = dict.fromkeys(params, "batch")
        (value,) = batch_samples(*arguments, draws=Draws(), generator=generator(), hold=hold)
    else:
        by_example = ByExample()
        (value,) = by_example.samples(*arguments, draws=Draws(), generator=generator(), hold=hold)
        kinds = {name: way.kind for name, way in by_example.ways.items()}
    held = outputs.detach() if hold else None
    truth, w, u = dense_sample(case, signs, kinds, held), flat_params(case), direction(case)
    assert value.item() == pytest.approx(truth(w).item(), rel=1e-9)
    slope = first_difference(truth, w, u, step=1e-6).item()
    assert along(value, params, u) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", [name for name in CASES if "batch norm" in name])
def test_through_batch_statistics(name):
    case = case_of(name)
    training = dataclasses.replace(case, model=copy.deepcopy(case.model).train())
    assert not torch.allclose(training.model(case.X), case.model(case.X))
    check_on_ggn(training, "batch")
    check_on_hessian(training)


@pytest.mark.parametrize("name", CASES)
def test_on_the_hessian(name):
    check_on_hessian(case_of(name))


def check_on_hessian(case):
    params = trainable(case.model)
    w, u = flat_params(case), direction(case)
    probe = Draws().probe(params, generator())
    v = torch.cat([part.flatten() for part in probe.values()])

    def truth(flat):
        _, product = torch.autograd.functional.vhp(
            lambda x: mean_in_words(case.task, outputs_at(case, x), case.y), flat, v
        )
        return product @ v

    value, slope = truth(w).item(), first_difference(truth, w, u, step=1e-6).item()
    objective = Objective(case.model, params, case.task)
    for mode in ("taylor", "forward", "reverse"):
        (sample,), _ = hessian_samples(
            objective, case.X, case.y, draws=Draws(), generator=generator(), modes=[mode]
        )
        assert sample.item() == pytest.approx(value, rel=1e-9, abs=1e-12), mode
        found = along(sample, params, u)
        assert found == pytest.approx(slope, rel=1e-5, abs=1e-7), mode


@pytest.mark.parametrize(
    "name", ["classes weighted and smoothed, relu", "tokens weighted, layer norm",
             "pixels weighted, tanh", "labels, relu"],
)  # fmt: skip
def test_labels_drawn_from_the_outputs(name):
    """Over all labels, each with its probability, u u^T is A; and they are drawn with these."""
    case = case_of(name)
    task, y = case.task, case.y
    with torch.no_grad():
        f = case.model(case.X)
    v = torch.randn(f.shape, generator=generator(), dtype=f.dtype)
    if task.name == "multilabel":
        p = torch.sigmoid(f)
        u = [task.label_root(f, y, torch.full_like(f, at)) for at in (0.0, 1.0)]  # all, none
        mean = p * u[0] ** 2 * v + (1 - p) * u[1] ** 2 * v
        kept = [(task.label_root(f, y, torch.rand(f.shape, generator=generator(s),
                                                  dtype=f.dtype)) == u[0]).double()
                for s in range(400)]  # fmt: skip
    else:
        dim = task.class_dim
        p, mean = F.softmax(f, dim), 0
        for c in range(f.shape[dim]):
            noise = torch.full_like(f, 1e-300)
            noise.select(dim, c).fill_(1 - 1e-15)
            u = task.label_root(f, y, noise)
            mean = mean + p.select(dim, c).unsqueeze(dim) * u * (u * v).sum(dim, keepdim=True)
        kept = []
        for s in range(400):
            noise = torch.rand(f.shape, generator=generator(s), dtype=f.dtype)
            kept.append((task.label_root(f, y, noise) < 0).double())
    torch.testing.assert_close(mean, task.curve(f, y, v))
    counts = torch.stack(kept).mean(0) - p
    counts = counts[task.curve(f, y, v) != 0]
    assert counts.abs().max() < 5 * 0.5 / 400**0.5
