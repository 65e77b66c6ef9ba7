"""Group norm with fast second derivatives against PyTorch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hesstrace_cli.autodiff.differentiable import differentiable_ops, held_statistics


def operands(shape, needs):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[1:2], shape[1:2])
    drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return [
        None if need is None else t.requires_grad_(need)
        for t, need in zip(drawn, needs, strict=True)
    ]


def derivatives(X, weight, bias, eps):
    asked = [t for t in (X, weight, bias) if t is not None and t.requires_grad]
    Y = F.group_norm(X, 2, weight, bias, eps)
    first = torch.autograd.grad((Y.cos() * Y).sum(), asked, create_graph=True)
    total = sum((g.sin() + g.square()).sum() for g in first) + Y.pow(3).sum()
    return [Y, *first, *torch.autograd.grad(total, asked)]


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("needs", [
    (True, True, True), (False, True, True), (True, False, True), (True, True, False),
    (True, None, None), (True, False, False), (True, True, None),
])  # fmt: skip
@pytest.mark.parametrize("shape", [(3, 4, 2, 3), (5, 6), (2, 4, 7)])
def test_values_and_derivatives(shape, needs, eps):
    given = operands(shape, needs)
    native = derivatives(*given, eps)
    with differentiable_ops(order=2):
        own = derivatives(*given, eps)
    for ours, theirs in zip(own, native, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_weights_may_be_left_out():
    X, weight, bias = operands((3, 4, 5), (True, True, True))
    with differentiable_ops(order=2, by_example=True):
        Y = F.group_norm(X.tanh(), 2, weight, bias).square().sum()
    for kept in (True, False):
        with held_statistics(with_weights=kept):
            grads = torch.autograd.grad(
                Y, [X, weight, bias], retain_graph=True, allow_unused=True
            )  # fmt: skip
        assert [g is not None for g in grads] == [True, kept, kept]


def test_memory_formats_and_half_precision():
    X = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    native = F.group_norm(X, 2, weight, bias)
    with differentiable_ops(order=2):
        torch.testing.assert_close(F.group_norm(X, 2, weight, bias), native)
        half = F.group_norm(X.bfloat16(), 2, weight, bias)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), native, rtol=0.02, atol=0.02)
