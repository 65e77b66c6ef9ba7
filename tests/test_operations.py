"""PyTorch's own list of operations: v^T H v and its gradient are right, or they are refused.

The loss is sum(c sqrt(1 + y^2)) of y = f(w + (w - w0)^2 / 3) for an operation f, the entries of
its operands being the weights, so that first and second derivatives of the operands both matter.
The truth comes from differences of the loss's values alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hesstrace_cli.autodiff.calls import native_outputs, trainable
from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.curvature.checks.engines import choose_engine
from hesstrace_cli.curvature.checks.verdicts import pinned
from hesstrace_cli.curvature.hessian import quadratic_form
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.errors import DerivativeError
from tests.curvature import oracles

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.zeros(1, dtype=torch.float64)

# Those that were once silently wrong in some engine first, then some of each kind.
SAMPLE = [
    "logdet", "linalg.det", "linalg.slogdet", "linalg.solve", "fft.fft", "fft.rfft", "stft",
    "polar", "nn.functional.normalize", "norm", "linalg.vector_norm", "std", "std_mean", "to",
    "cdist", "nn.functional.embedding", "nn.functional.layer_norm", "nn.functional.batch_norm",
    "nn.functional.instance_norm", "nn.functional.hardsigmoid", "nn.functional.dropout",
    "nn.functional.scaled_dot_product_attention", "linalg.inv", "linalg.cholesky", "linalg.eigh",
    "linalg.pinv", "matrix_exp", "nn.functional.conv2d", "nn.functional.bilinear", "einsum",
    "cumprod", "prod", "logsumexp", "atan2", "where", "index_put", "scatter_add", "lerp", "renorm",
    "nn.functional.gelu", "nn.functional.max_pool2d", "nn.functional.interpolate.bicubic",
]  # fmt: skip


@functools.cache
def operations():
    with patch.object(torch.backends, "disable_global_flags"):  # for the whole process
        invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    # A draw has no gradient at all, whatever it depends on.
    ops = [
        op
        for op in invocations.op_db
        if op.supports_autograd and torch.float64 in op.dtypes and op.name != "normal"
    ]
    return {op.name + (f".{op.variant_test_name}" if op.variant_test_name else ""): op
            for op in ops}  # fmt: skip


class Operation(nn.Module):
    """An operation whose operands that need a gradient are the weights."""

    def __init__(self, function, sample):
        super().__init__()
        flat, self.spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        self.function, self.flat = function, flat
        self.places = [i for i, each in enumerate(flat)
                       if isinstance(each, Tensor) and each.requires_grad
                       and each.is_floating_point() and each.numel()]  # fmt: skip
        own = [flat[i].detach().clone() for i in self.places]
        self.operands = nn.ParameterList([nn.Parameter(each) for each in own])
        self.base = [each.clone() for each in own]

    def forward(self, X):
        flat = list(self.flat)
        for i, w, w0 in zip(self.places, self.operands, self.base, strict=True):
            flat[i] = w + (w - w0) ** 2 / 3
        args, kwargs = tree_unflatten(flat, self.spec)
        leaves = tree_flatten(self.function(*args, **kwargs))[0]
        outs = [o for o in leaves if isinstance(o, Tensor) and o.layout is torch.strided]
        outs = [torch.view_as_real(o.resolve_conj()) if o.is_complex() else o for o in outs]
        outs = [o.reshape(-1).double() for o in outs if o.is_floating_point()]
        return torch.cat(outs)


class SumOfRoots:
    """No task but for its loss."""

    def loss(self, output, targets):
        c = torch.linspace(0.5, 1.5, 10_000, dtype=torch.float64)
        return ((1 + output * output).sqrt() * c[: len(output)]).sum()

    def num_terms(self, targets):
        return 1


def models(op, *, in_place):
    """The operation on the first samples that give a real number."""
    function = op.inplace_variant if in_place else op
    if function is None:
        return
    given = 0
    for sample in itertools.islice(op.sample_inputs("cpu", torch.float64, requires_grad=True), 8):
        if not isinstance(sample.input, Tensor):
            if in_place:
                continue
        elif in_place and not sample.input.is_floating_point():
            continue
        try:
            model = Operation(function, sample)
            with pinned():
                output = model(X)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue  # gives nothing to differentiate
        if model.places and output.numel() and output.requires_grad and output.isfinite().all():
            given += 1
            yield model
        if given == 2:
            return


def truths(objective, v, u):
    """v^T H v and its slope along u, or None where their differences do not settle."""
    params = objective.params
    w = oracles.flatten(params)

    @torch.no_grad()
    def loss(at):
        with pinned():
            values = oracles.unflatten(at, params)
            output = native_outputs(objective.model, X, values)
        return objective.task.loss(output, X)

    def both(step):
        value = oracles.second_difference(loss, w, v, step)
        slope = oracles.first_difference(
            lambda at: oracles.second_difference(loss, at, v, step), w, u, step
        )
        return torch.stack([value, slope])

    for step in (1e-2, 2e-3):
        found, again = both(2 * step), both(step)
        if ((found - again).abs() <= 3e-4 * (0.1 + again.abs())).all():
            return again.tolist()
    return None


def verdict(model):
    """What became of the operation, and by which engine."""
    objective = Objective(model, trainable(model), SumOfRoots())
    try:
        found = choose_engine(
            objective, X, X, curvature="hessian", compiled=False, single=True, seed=0
        )
    except DerivativeError:
        return "refused", ""
    generator = torch.Generator().manual_seed(1)
    v, u = ({n: 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
             for n, p in objective.params.items()} for _ in range(2))  # fmt: skip
    truth = truths(objective, oracles.flatten(v), oracles.flatten(u))
    if truth is None:
        return "unsettled", found.engine
    with pinned():
        value = quadratic_form(
            lambda p: objective.loss(p, X, X), objective.params, v, mode=found.engine
        )
        grads = gradient(value, objective.params)
    slope = sum((grads[n] * u[n]).sum().item() for n in u)
    near = all(abs(a - b) <= 1e-3 * (0.1 + abs(b))
               for a, b in zip((value.item(), slope), truth, strict=True))  # fmt: skip
    if not math.isfinite(value.item()) and not all(g.isfinite().all() for g in grads.values()):
        return "not finite, which stops a step", found.engine
    return ("right" if near else f"WRONG: {value.item(), slope} for {truth}"), found.engine


def table(names, *, in_place=False):
    rows = {}
    for name in names:
        for number, model in enumerate(models(operations()[name], in_place=in_place)):
            rows[name, number] = verdict(model)
    return rows


def silently_wrong(rows):
    return {name: row for name, row in rows.items() if row[0].startswith("WRONG")}


def test_a_sample_of_operations():
    rows = table(SAMPLE)
    assert not silently_wrong(rows)
    right = [row for row in rows.values() if row[0] == "right"]
    assert len(right) > 0.8 * len(rows)
    assert {engine for _, engine in right} >= {"taylor", "reverse"}


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("part", range(8))
def test_every_operation(part, in_place):
    rows = table(list(operations())[part::8], in_place=in_place)
    assert not silently_wrong(rows)
    assert sum(row[0] == "right" for row in rows.values()) > 0.6 * len(rows)
