"""v^T H v and its gradient against finite differences of the model as PyTorch runs it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hesstrace_cli.autodiff.calls import trainable, uses_batch_statistics
from hesstrace_cli.autodiff.differentiable import differentiable_ops
from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.curvature.blame import derivative_error
from hesstrace_cli.curvature.ggn import ggn_vp, trace_sample
from hesstrace_cli.curvature.hessian import hvp, quadratic_form
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.probes import draw_keep, draw_probe, rademacher
from hesstrace_cli.errors import DerivativeError, HesstraceError
from hesstrace_cli.tasks.softmax import softmax_root
from tests.curvature import oracles
from tests.curvature.zoo import CASES, dense, make


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def direction(params, seed):
    g = generator(seed)
    return {n: torch.randn(p.shape, generator=g, dtype=p.dtype) for n, p in params.items()}


def setup(name, train):
    model, X, y = make(name, train=train)
    objective = Objective(model, trainable(model))
    params = objective.params
    w = oracles.flatten(params)

    def native(flat):
        return oracles.native_loss(model, oracles.unflatten(flat, params), X, y)

    return objective, X, y, w, native


@pytest.mark.parametrize("mode", ["taylor", "forward", "reverse"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_quadratic_form_and_its_gradient(name, train, mode):
    objective, X, y, w, native = setup(name, train)
    params = objective.params
    v, u = direction(params, 1), direction(params, 2)
    flat_v, flat_u = oracles.flatten(v), oracles.flatten(u)

    value = quadratic_form(lambda p: objective.loss(p, X, y), params, v, mode=mode)
    slope = sum((gradient(value, params)[n] * u[n]).sum() for n in params)

    truth = oracles.second_difference(native, w, flat_v)
    true_slope = oracles.first_difference(
        lambda at: oracles.second_difference(native, at, flat_v), w, flat_u
    )
    torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, true_slope, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_hvp_is_the_dense_hessian(name):
    if name in ("weight_norm", "hardsigmoid", "attention", "transformer"):
        pytest.skip("PyTorch's own second derivative is wrong or missing")
    objective, X, y, _, _ = setup(name, train=False)
    params = objective.params
    H = oracles.dense_hessian(objective, X, y)
    v = direction(params, 1)
    grad = gradient(objective.loss(params, X, y), params, create_graph=True)
    product = oracles.flatten(hvp(grad, params, v))
    torch.testing.assert_close(product, H @ oracles.flatten(v), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["relu", "gelu", "batch_norm_2d", "layer_norm", "tied", "lstm"])
@pytest.mark.parametrize("train", [True, False])
def test_ggn_product_and_mean_sample_are_the_dense_matrix(name, train):
    objective, X, y, _, _ = setup(name, train)
    params = objective.params
    G = oracles.dense_ggn(objective, X)
    v = direction(params, 1)
    product = ggn_vp(lambda p: objective.outputs(p, X), params, v, objective.task, y)
    torch.testing.assert_close(
        oracles.flatten(product), G @ oracles.flatten(v), rtol=1e-9, atol=1e-10
    )
    # One sign per class and example, all other examples silenced, gives tr(G) with no chance left.
    keep = draw_keep(params, scheme="none", keep_prob=1.0, generator=generator())
    total = 0.0
    for i in range(len(X)):
        for c in range(3):
            e = torch.zeros(len(X), 3, dtype=X.dtype)
            e[i, c] = 1
            logits = objective.outputs(params, X)
            total += sum(
                trace_sample(logits, params, softmax_root(logits, e), keep, len(X)).values()
            )
    torch.testing.assert_close(total.detach(), G.trace())


@pytest.mark.parametrize("name", ["gelu", "batch_norm_1d", "layer_norm", "weight_norm"])
def test_gradient_of_the_ggn_sample(name):
    """Against finite differences of the same sample, its squared gradient taken natively."""
    objective, X, _, w, _ = setup(name, train=True)
    params = objective.params
    e = rademacher(X[:, :3], generator=generator())
    keep = draw_keep(params, scheme="tensor", keep_prob=0.5, generator=generator(3))

    def sample(values):
        buffers = {n: b.clone() for n, b in objective.model.named_buffers()}
        logits = torch.func.functional_call(objective.model, {**values, **buffers}, (X,))
        u = softmax_root(logits, e).detach()
        grads = torch.autograd.grad(logits, [values[n] for n in keep], grad_outputs=u)
        pairs = zip(keep.values(), grads, strict=True)
        return sum((s * g).square().sum() for s, g in pairs) / len(X)

    def native(flat):
        return sample(oracles.unflatten(flat.requires_grad_(), params)).detach()

    logits = objective.outputs(params, X)
    value = sum(trace_sample(logits, params, softmax_root(logits, e), keep, len(X)).values())
    u = direction(params, 2)
    slope = sum((gradient(value, params)[n] * u[n]).sum() for n in params)
    torch.testing.assert_close(value.detach(), native(w.clone()))
    true_slope = oracles.first_difference(lambda at: native(at.detach()), w, oracles.flatten(u))
    torch.testing.assert_close(slope, true_slope, rtol=1e-6, atol=1e-8)


def test_softmax_root_squares_to_the_softmax_hessian():
    logits = torch.tensor([[1.0, -2.0, 0.5], [200.0, 0.0, -300.0]], dtype=torch.float64)
    logits.requires_grad_()
    columns = torch.stack([softmax_root(logits, e) for e in torch.eye(3, dtype=torch.float64)], -1)
    p = F.softmax(logits, -1)
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(columns @ columns.mT, A)
    (slope,) = torch.autograd.grad(columns.sum(), logits)
    assert torch.isfinite(slope).all()


def test_linear_softmax_has_its_closed_form():
    """Per weight matrix, tr(H) is the mean of ||x||^2 (1 - sum p_k^2)."""
    model = nn.Linear(8, 3, bias=False).double()
    X, y = torch.randn(10, 8, dtype=torch.float64), torch.arange(10) % 3
    objective = Objective(model, trainable(model))
    H = oracles.dense_hessian(objective, X, y)
    p = F.softmax(model(X), -1)
    closed = (X.square().sum(1) * (1 - p.square().sum(1))).mean()
    torch.testing.assert_close(H.trace(), closed.detach())
    torch.testing.assert_close(oracles.dense_ggn(objective, X), H)
    # The columns of the identity as probes sum v^T H v to the trace itself.
    total = 0.0
    for column in torch.eye(24, dtype=torch.float64):
        v = oracles.unflatten(column, objective.params)
        total += quadratic_form(lambda p: objective.loss(p, X, y), objective.params, v)
    torch.testing.assert_close(total.detach(), closed.detach())


def test_penalty_leaves_batch_statistics_alone():
    model, X, y = make("batch_norm_1d", train=True)
    before = {n: b.clone() for n, b in model.named_buffers()}
    objective = Objective(model, trainable(model))
    v = draw_probe(objective.params, generator=generator())
    quadratic_form(lambda p: objective.loss(p, X, y), objective.params, v)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize(("name", "train"), [("batch_norm_1d", True), ("layer_norm", True),
                                             ("batch_norm_1d", False)])  # fmt: skip
def test_batch_statistics_are_noticed(name, train):
    model, X, _ = make(name, train=train)
    assert uses_batch_statistics(model, X) is (name == "batch_norm_1d" and train)


class OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * 2 * ctx.saved_tensors[0]


class Square(nn.Module):
    def forward(self, X):
        return OnceOnly.apply(X)


def test_a_missing_second_derivative_is_refused_by_name():
    model = dense(Square()).double()
    X, y = torch.randn(6, 8, dtype=torch.float64), torch.arange(6) % 3
    objective = Objective(model, trainable(model))
    v = draw_probe(objective.params, generator=generator())
    with pytest.raises(NotImplementedError) as caught:
        quadratic_form(lambda p: objective.loss(p, X, y), objective.params, v, mode="reverse")
    error = derivative_error(caught.value, objective, X)
    assert isinstance(error, DerivativeError)
    assert "module '1' (Square)" in str(error)
    assert isinstance(error, HesstraceError)
    assert error.exit_code == 4


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("of_batch", [True, False])
def test_norms_called_from_torch_take_their_own_order(name, order, of_batch):
    """There the weights come before the statistics, in torch.nn.functional after them."""
    X, weight, bias, mean = (torch.randn(s, dtype=torch.float64) for s in ((4, 3, 5), 3, 3, 3))
    settings = (X, weight, bias, mean, torch.rand_like(mean) + 1, of_batch, 0.1, 1e-5, False)
    truth = getattr(torch, name)(*settings)
    with differentiable_ops(order=order, by_example=order == 2):
        torch.testing.assert_close(getattr(torch, name)(*settings), truth)
