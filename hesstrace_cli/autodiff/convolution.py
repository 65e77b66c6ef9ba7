"""Convolutions whose second derivatives in reverse mode take PyTorch's fast kernels.

Of y = w * x, bilinear, all derivatives are one of three: the convolution, its gradient in x and its
gradient in w. PyTorch's own double backward makes the last of them by a convolution with a kernel
of the image's size, in several times the time, and always computes all that it can; here each is
asked for by itself, as autograd runs only those nodes that lead to what is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """What a convolution is but for its numbers, as `torch.convolution` takes it."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def side_by_side(self, num_examples: int) -> Kernel:
        """The same for as many examples, each with channels and a weight of its own."""
        return dataclasses.replace(self, groups=num_examples * self.groups)

    def forward(self, X: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution."""
        return torch.convolution(
            X, W, bias, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups,
        )  # fmt: skip

    def of_input(self, g: Tensor, X: Tensor, W: Tensor) -> Tensor:
        """Its gradient in X, of which the shape is read alone."""
        found: Tensor = self._backward(g, X, W, None, [True, False, False])[0]
        return found

    def of_weight(self, g: Tensor, X: Tensor, W: Tensor) -> Tensor:
        """Its gradient in W, of which the shape is read alone."""
        found: Tensor = self._backward(g, X, W, None, [False, True, False])[1]
        return found

    def of_weights(
        self, g: Tensor, X: Tensor, W: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Its gradients in W and in the bias, of which the shapes are read alone."""
        shape = None if bias is None else list(bias.shape)
        _, of_W, of_bias = self._backward(g, X, W, shape, [False, True, bias is not None])
        return of_W, of_bias

    def _backward(
        self, g: Tensor, X: Tensor, W: Tensor, bias: list[int] | None, asked: list[bool]
    ) -> Any:
        return torch.ops.aten.convolution_backward(
            g, X, W, bias, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups, asked,
        )  # fmt: skip


class _Both(torch.autograd.Function):
    """One output as a function of the input by one node, and of the weights by another.

    All are the same memory, and none is a view to autograd, so that it may be written to in place.
    """

    @staticmethod
    def forward(_ctx: Any, through_input: Tensor, _through_weights: Tensor) -> Tensor:
        return through_input.detach()

    @staticmethod
    def backward(_ctx: Any, *g: Tensor) -> Any:
        return g[0], g[0]


class _OfInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor, rest: tuple[Tensor, Tensor], kernel: Kernel) -> Tensor:
        Y, W = rest
        ctx.save_for_backward(X, W)
        ctx.kernel = kernel
        return Y.detach()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        return _InputGradient.apply(g[0], *ctx.saved_tensors, ctx.kernel), None, None


class _OfWeights(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, W: Tensor, bias: Tensor | None, rest: tuple[Tensor, Tensor], kernel: Kernel
    ) -> Tensor:
        Y, X = rest
        ctx.save_for_backward(X, W, bias)
        ctx.kernel = kernel
        return Y.detach()

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        return *_WeightGradients.apply(g[0], *ctx.saved_tensors, ctx.kernel), None, None


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, X: Tensor, W: Tensor, kernel: Kernel) -> Tensor:
        ctx.save_for_backward(g, W)
        ctx.kernel = kernel
        return kernel.of_input(g, X, W)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (g, W), (slope,), kernel = ctx.saved_tensors, slopes, ctx.kernel
        of_g = kernel.forward(slope, W) if ctx.needs_input_grad[0] else None
        of_W = kernel.of_weight(g, slope, W) if ctx.needs_input_grad[2] else None
        return of_g, None, of_W, None


class _WeightGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, X: Tensor, W: Tensor, bias: Tensor | None, kernel: Kernel
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(g, X)
        ctx.kernel = kernel
        ctx.set_materialize_grads(False)
        return kernel.of_weights(g, X, W, bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        (g, X), (slope, of_bias), kernel = ctx.saved_tensors, slopes, ctx.kernel
        of_g = of_X = None
        if slope is not None and ctx.needs_input_grad[0]:
            of_g = kernel.forward(X, slope)
        if of_bias is not None and ctx.needs_input_grad[0]:
            shifts = of_bias.reshape(1, -1, *[1] * (g.dim() - 2))
            of_g = shifts.expand_as(g) if of_g is None else of_g + shifts
        if slope is not None and ctx.needs_input_grad[1]:
            of_X = kernel.of_input(g, X, slope)
        return of_g, of_X, None, None, None


OF_WEIGHTS, BOTH = _OfWeights.__name__, _Both.__name__
"""The names of nodes: of what saves x, w and the bias, and whose first two inputs are the last
two; and of the one behind the output, whose second input is the former, if it has one."""


def _convolved(X: Tensor, W: Tensor, bias: Tensor | None, kernel: Kernel) -> Tensor:
    with torch.no_grad():
        Y = kernel.forward(X, W, bias)
    weights_count = W.requires_grad or (bias is not None and bias.requires_grad)
    by_input: Tensor = _OfInput.apply(X, (Y, W), kernel) if X.requires_grad else Y
    if not weights_count:
        return by_input
    by_weights: Tensor = _OfWeights.apply(W, bias, (Y, X), kernel)
    if not X.requires_grad:
        return by_weights
    both: Tensor = _Both.apply(by_input, by_weights)
    return both


def _all(value: int | Sequence[int], dimensions: int) -> list[int]:
    return [value] * dimensions if isinstance(value, int) else list(value) * (
        dimensions if len(value) == 1 else 1
    )  # fmt: skip


def _replaced(native: Callable[..., Tensor], *, transposed: bool) -> Callable[..., Tensor]:
    """The same function of the same arguments; what is unusual goes to PyTorch's own."""

    def settings(stride: Any = 1, padding: Any = 0, *rest: Any, **named: Any) -> Any:
        names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        named = {**dict(zip(names, rest, strict=False)), **named}
        return stride, padding, named

    def call(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        stride, padding, named = settings(*args, **kwargs)
        is_usual = input.dim() == weight.dim() and not isinstance(padding, str)
        if not is_usual or not input.is_floating_point() or not torch.is_grad_enabled():
            return native(input, weight, bias, *args, **kwargs)
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        D = weight.dim() - 2
        kernel = Kernel(
            _all(stride, D), _all(padding, D), _all(named.get("dilation", 1), D), transposed,
            _all(named.get("output_padding", 0), D), named.get("groups", 1),
        )  # fmt: skip
        return _convolved(input, weight, bias, kernel)

    return call


CONVOLUTIONS: dict[Any, Callable[..., Tensor]] = {
    **{
        native: _replaced(native, transposed=False)
        for native in (torch.conv1d, torch.conv2d, torch.conv3d)
    },
    **{
        native: _replaced(native, transposed=True)
        for native in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    },
}
"""By PyTorch's functions, which `torch.nn.functional` has under the same names."""
