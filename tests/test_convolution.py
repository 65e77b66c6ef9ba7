"""Convolutions with fast second derivatives against PyTorch's own, in all settings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hesstrace_cli.autodiff.differentiable import differentiable_ops

CASES = {
    "1d": (F.conv1d, (3, 4, 7), (6, 4, 3), {"padding": 1}),
    "1d, stride, dilation": (F.conv1d, (3, 4, 9), (6, 4, 2), {"stride": 2, "dilation": 3}),
    "2d": (F.conv2d, (3, 4, 5, 6), (6, 4, 3, 3), {"padding": 1}),
    "2d, all settings": (
        F.conv2d, (3, 4, 7, 6), (6, 2, 3, 2),
        {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2},
    ),
    "2d, positional": (F.conv2d, (3, 4, 5, 6), (4, 1, 3, 3), (2, 1, 1, 4)),
    "2d, same": (F.conv2d, (3, 4, 5, 6), (6, 4, 3, 3), {"padding": "same"}),
    "2d, without a batch": (F.conv2d, (4, 5, 6), (6, 4, 3, 3), {}),
    "3d": (F.conv3d, (2, 2, 3, 4, 3), (3, 2, 2, 2, 2), {"stride": (1, 2, 1)}),
    "transposed, 1d": (F.conv_transpose1d, (3, 4, 5), (4, 3, 3), {"stride": 2}),
    "transposed, all settings": (
        F.conv_transpose2d, (3, 4, 3, 4), (4, 3, 3, 2),
        {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": (1, 2)},
    ),
    "transposed, positional": (F.conv_transpose2d, (3, 4, 3, 4), (4, 3, 3, 2), (2, 1, 1, 2, 1)),
    "transposed, 3d": (F.conv_transpose3d, (2, 2, 3, 2, 3), (2, 3, 2, 2, 2), {}),
}  # fmt: skip


def drawn(name, needs=(True, True, True)):
    function, of_input, of_weight, settings = CASES[name]
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(of_input, generator=generator, dtype=torch.float64)
    W = torch.randn(of_weight, generator=generator, dtype=torch.float64)
    groups = settings.get("groups", 1) if isinstance(settings, dict) else settings[3]
    channels = of_weight[1] * groups if "transpose" in function.__name__ else of_weight[0]
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    operands = [t.requires_grad_(need) for t, need in zip((draw, W, bias), needs, strict=True)]

    def call(X, W, bias):
        if isinstance(settings, dict):
            return function(X, W, bias, **settings)
        return function(X, W, bias, *settings)

    return call, operands


def derivatives(call, operands):
    """The output, its gradients, and those of their squares and of a product with the output."""
    asked = [t for t in operands if t.requires_grad]
    Y = call(*operands)
    first = torch.autograd.grad(Y.square().sum(), asked, create_graph=True)
    total = sum(g.pow(3).sum() for g in first) + (Y * Y.detach().cos()).sum()
    return [Y, *first, *torch.autograd.grad(total, asked)]


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (True, False, False),
                                   (True, True, False), (True, False, True)])  # fmt: skip
@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives(name, needs):
    call, operands = drawn(name, needs)
    native = derivatives(call, operands)
    with differentiable_ops(order=2):
        own = derivatives(call, operands)
    for ours, theirs in zip(own, native, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    half = 1 + sum(needs)  # values and first derivatives are those of the same kernels
    for ours, theirs in zip(own[:half], native[:half], strict=True):
        assert torch.equal(ours, theirs)


def test_only_what_is_asked_for_is_computed(monkeypatch):
    """As every example's norms take no gradient of a weight, and dropped tensors none."""
    from hesstrace_cli.autodiff import convolution

    call, (X, W, bias) = drawn("2d")
    with differentiable_ops(order=2):
        Y = call(torch.tanh(X), W, bias).sum()
    counted = []
    for name in ("of_input", "of_weights"):
        whole = getattr(convolution.Kernel, name)
        monkeypatch.setattr(
            convolution.Kernel, name,
            lambda *args, whole=whole, name=name: counted.append(name) or whole(*args),
        )  # fmt: skip
    torch.autograd.grad(Y, X, retain_graph=True)
    assert counted == ["of_input"]
    torch.autograd.grad(Y, W, retain_graph=True)
    assert counted == ["of_input", "of_weights"]


def test_its_output_may_be_written_to():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)).double()
    X, found = torch.randn(4, 2, 6, 6, dtype=torch.float64), []
    params = list(model.parameters())
    for context in (differentiable_ops(order=1), differentiable_ops(order=2)):
        with context:
            Y = model(X)
        first = torch.autograd.grad(Y.square().sum(), params, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), params))
    for native, own in zip(*found, strict=True):
        torch.testing.assert_close(own, native)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_in_half_precision(dtype):
    torch.manual_seed(0)
    layer, X = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 6, 6)
    with torch.autocast("cpu", dtype):
        native = layer(X)
        with differentiable_ops(order=2):
            own = layer(X)
    assert own.dtype is native.dtype is dtype
    assert torch.equal(own, native)
    own.float().square().sum().backward()
    assert layer.weight.grad.dtype is torch.float32
