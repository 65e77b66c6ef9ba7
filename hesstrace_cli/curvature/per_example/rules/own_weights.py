"""A convolution's weight gradient of every example, all at once: each one a group of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hesstrace_cli.autodiff.convolution import Kernel
from hesstrace_cli.curvature.per_example.rules.layout import Layout, in_full


def _side_by_side(images: Tensor, layout: Layout) -> Tensor:
    """From (R, C, ...) to (L, N C, ...)."""
    return layout.group(images).transpose(0, 1).flatten(1, 2)


def _one_by_one(images: Tensor, layout: Layout) -> Tensor:
    """From (L, N C, ...) to (R, C, ...)."""
    grouped = images.unflatten(1, (layout.num_examples, -1))  # (L, N, C, ...)
    return (grouped if layout.strided else grouped.transpose(0, 1)).flatten(0, 1)


def own_weight_norms(
    g: Tensor, X: Tensor, layout: Layout, kernel: Kernel, shape: torch.Size, scale: Tensor | None
) -> Tensor:
    """||s * P_i||^2 (N,) of every example's gradient P_i, to be differentiated once.

    Args:
        g: The gradient of the output.
        X: The input.
        layout: Of their rows.
        kernel: Of the convolution.
        shape: Of the weight.
        scale: s, of that shape; None for 1.
    """
    norms: Tensor = _OwnWeightNorms.apply(g, X, layout, kernel, shape, scale)
    return norms


def keeps_derivatives(numbers: int, g: Tensor, X: Tensor) -> bool:
    """Whether they are fewer numbers than what they are made of."""
    return numbers > g.numel() + X.numel()


class _OwnWeightNorms(torch.autograd.Function):
    """What is held is P or, where that is smaller, the derivatives in g and X: P convolved.

    These are known but for the factors that come for each example.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, X: Tensor, layout: Layout, kernel: Kernel, shape: torch.Size,
        scale: Tensor | None,
    ) -> Tensor:  # fmt: skip
        N = layout.num_examples
        ctx.settings = layout, kernel, keeps_derivatives(N * shape.numel(), g, X)
        W = g.new_empty((N * shape[0], *shape[1:]))
        images = _side_by_side(g, layout), _side_by_side(X, layout)
        grads = in_full(kernel.side_by_side(N).of_weight(*images, W))
        grads = grads.unflatten(0, (N, -1))
        scaled = grads if scale is None else grads * scale.square()
        norms = torch.linalg.vecdot(grads.flatten(1), scaled.flatten(1))
        if ctx.settings[2]:
            ctx.save_for_backward(*_pulled(ctx, g, X, 2 * scaled))
        else:
            ctx.save_for_backward(g, X, scaled)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        layout, _, are_derivatives = ctx.settings
        rest = (None,) * 4
        if are_derivatives:
            return *(_times(each, slope, layout) for each in ctx.saved_tensors), *rest
        g, X, scaled = ctx.saved_tensors
        column = slope.reshape(-1, *[1] * (scaled.dim() - 1))
        return *_pulled(ctx, g, X, 2 * column * scaled), *rest


def _pulled(ctx: Any, g: Tensor, X: Tensor, slopes: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients in g and X where those in the P_i are these."""
    layout, kernel, _ = ctx.settings
    kernel, W = kernel.side_by_side(layout.num_examples), slopes.flatten(0, 1).to(X.dtype)
    g, X = _side_by_side(g, layout), _side_by_side(X, layout)
    of_g = of_X = None
    if ctx.needs_input_grad[0]:
        of_g = _one_by_one(kernel.forward(X, W), layout)
    if ctx.needs_input_grad[1]:
        of_X = _one_by_one(kernel.of_input(g, X, W), layout)
    return of_g, of_X


def _times(each: Tensor | None, slope: Tensor, layout: Layout) -> Tensor | None:
    if each is None:
        return None
    grouped = layout.group(each)
    scaled = grouped * slope.to(each.dtype).reshape(-1, *[1] * (grouped.dim() - 1))
    return (scaled.transpose(0, 1) if layout.strided else scaled).flatten(0, 1)
