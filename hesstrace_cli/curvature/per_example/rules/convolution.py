"""Convolutions: patches unfolded, or every example a group of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hesstrace_cli.curvature.per_example.rules.chunks import at_once
from hesstrace_cli.curvature.per_example.rules.layout import (
    Layout,
    Norms,
    NormsOf,
    Rows,
    Scales,
    in_full,
    is_recorded,
    total_squares,
)
from hesstrace_cli.curvature.per_example.rules.outer import Outer, gram_is_cheaper


@dataclass(frozen=True)
class _Kernel:
    """What a convolution is but for its numbers, as `torch.convolution` takes it."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @classmethod
    def of(cls, node: Any) -> _Kernel:
        """That of a node of the graph."""
        return cls(
            list(node._saved_stride), list(node._saved_padding), list(node._saved_dilation),
            node._saved_transposed, list(node._saved_output_padding), node._saved_groups,
        )  # fmt: skip

    def side_by_side(self, num_examples: int) -> _Kernel:
        """The same for as many examples, each with channels and a weight of its own."""
        return dataclasses.replace(self, groups=num_examples * self.groups)

    def forward(self, X: Tensor, W: Tensor) -> Tensor:
        """The convolution."""
        return torch.convolution(
            X, W, None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups,
        )  # fmt: skip

    def backward(self, g: Tensor, X: Tensor, W: Tensor, *, of_weight: bool) -> Tensor:
        """Its gradient in the weight, of which the shape is read alone, or in X."""
        grads = torch.ops.aten.convolution_backward(
            g, X, W, None, self.stride, self.padding, self.dilation, self.transposed,
            self.output_padding, self.groups, [not of_weight, of_weight, False],
        )  # fmt: skip
        found: Tensor = grads[1 if of_weight else 0]
        return found


def _side_by_side(images: Tensor, layout: Layout) -> Tensor:
    """From (R, C, ...) to (L, N C, ...)."""
    return layout.group(images).transpose(0, 1).flatten(1, 2)


def _one_by_one(images: Tensor, layout: Layout) -> Tensor:
    """From (L, N C, ...) to (R, C, ...)."""
    grouped = images.unflatten(1, (layout.num_examples, -1))  # (L, N, C, ...)
    return (grouped if layout.strided else grouped.transpose(0, 1)).flatten(0, 1)


class _WeightGradients(torch.autograd.Function):
    """Every example's gradient of a convolution's weight, shape (N, *W.shape).

    All at once: a convolution in groups, of which each example is one or more.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, X: Tensor, layout: Layout, kernel: _Kernel, shape: torch.Size
    ) -> Tensor:
        N = layout.num_examples
        ctx.save_for_backward(g, X)
        ctx.settings = layout, kernel
        g, X = _side_by_side(g, layout), _side_by_side(X, layout)
        W = g.new_empty((N * shape[0], *shape[1:]))
        grads = kernel.side_by_side(N).backward(g, X, W, of_weight=True)
        return grads.unflatten(0, (N, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        g, X = ctx.saved_tensors
        layout, kernel = ctx.settings
        kernel, W = kernel.side_by_side(layout.num_examples), slope.flatten(0, 1)
        g, X = _side_by_side(g, layout), _side_by_side(X, layout)
        of_g = of_X = None
        if ctx.needs_input_grad[0]:
            of_g = _one_by_one(kernel.forward(X, W), layout)
        if ctx.needs_input_grad[1]:
            of_X = _one_by_one(kernel.backward(g, X, W, of_weight=False), layout)
        return of_g, of_X, None, None, None


_FEW = 32
"""Examples for which a GPU convolves in groups faster than it unfolds and multiplies.

The number of `torch.nn.utils._expanded_weights`.
"""


def convolution(node: Any) -> NormsOf | None:
    """Convolutions of any kind; x_l is the l-th patch."""
    X, W, kernel = node._saved_input, node._saved_weight, _Kernel.of(node)
    groups = kernel.groups

    def two(values: Sequence[int], default: int) -> tuple[int, int]:
        return (default, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))

    window: dict[str, Any] = {
        "kernel_size": two(W.shape[2:], 1),
        "dilation": two(kernel.dilation, 1),
        "padding": two(kernel.padding, 0),
        "stride": two(kernel.stride, 1),
    }
    window_by_axis = [window[name] for name in ("padding", "dilation", "kernel_size", "stride")]

    def unfolded(images: Tensor, places: Sequence[int]) -> Tensor:
        """The patches at the given places; output padding leaves some after them that meet none."""
        images = images.unsqueeze(2) if W.dim() == 3 else images
        grid = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(images.shape[2:], *window_by_axis, strict=True)
        ]
        columns = F.unfold(images, **window)
        if math.prod(grid) == math.prod(places):
            return columns
        height, width = two(places, 1)
        return columns.unflatten(2, grid)[:, :, :height, :width].flatten(2)

    def vectors(layout: Layout, places: Sequence[int] | None = None) -> Rows:
        """From (R, C, H, W) to (N * groups, positions of all rows, channels or patch)."""

        def rows(images: Tensor) -> Tensor:
            columns = images.flatten(2) if places is None else unfolded(images, places)
            grouped = layout.group(columns.unflatten(1, (groups, -1)))  # (N, L, groups, d, places)
            return grouped.permute(0, 2, 1, 4, 3).flatten(2, 3).flatten(0, 1)

        return rows

    remembered: dict[Layout, Outer] = {}

    def unfolded_norms(g: Tensor, x: Tensor, layout: Layout, whole: bool) -> Tensor:
        image, other = (g, x) if kernel.transposed else (x, g)
        outer = remembered.get(layout) if whole else None
        if outer is None:
            outer = Outer(image, vectors(layout, other.shape[2:]))
            if whole and not kernel.transposed:
                remembered[layout] = outer
        return outer.norms(other, vectors(layout)).unflatten(0, (-1, groups)).sum(1)

    def by_unfolding(g: Tensor, layout: Layout) -> Tensor:
        N = layout.num_examples
        image = g if kernel.transposed else X
        positions = (X if kernel.transposed else g)[0, 0].numel()
        per_example = len(g) // N * positions * image.shape[1] * W[0, 0].numel()
        size = at_once(per_example)
        if size >= N or is_recorded(g, X):
            return unfolded_norms(g, X, layout, True)
        indices = layout.group(torch.arange(len(g), device=g.device))
        return torch.cat([
            unfolded_norms(g[at.flatten()], X[at.flatten()], Layout(len(at)), False)
            for at in indices.split(size)
        ])  # fmt: skip

    def by_groups(g: Tensor, layout: Layout, scale: Tensor | None) -> Tensor:
        N = layout.num_examples

        def norms(g: Tensor, x: Tensor, layout: Layout) -> Tensor:
            return total_squares(
                _WeightGradients.apply(g, x, layout, kernel, W.shape), scale
            )  # fmt: skip

        size = at_once(W.numel())
        if size >= N or is_recorded(g, X):
            return norms(g, X, layout)
        indices = layout.group(torch.arange(len(g), device=g.device))
        return torch.cat([
            norms(g[at.flatten()], X[at.flatten()], Layout(len(at))) for at in indices.split(size)
        ])  # fmt: skip

    def norms(g: Tensor, layout: Layout, scales: Scales) -> Norms:
        result: Norms = {}
        if "bias" in scales:
            summed = in_full(layout.group(g)).flatten(3).sum((1, 3))
            result["bias"] = total_squares(summed, scales["bias"])
        if X is None or "weight" not in scales:
            return result
        scale = scales["weight"]
        image, other = (g, X) if kernel.transposed else (X, g)
        positions = len(g) // layout.num_examples * other[0, 0].numel()
        k, d = other.shape[1] // groups, image.shape[1] // groups * W[0, 0].numel()
        may_unfold = W.dim() < 5 and scale is None
        is_slow = g.is_cuda and layout.num_examples >= _FEW
        if may_unfold and (is_slow or gram_is_cheaper(positions, k, d, recorded=is_recorded(g, X))):
            result["weight"] = by_unfolding(g, layout)
        else:
            result["weight"] = by_groups(g, layout, scale)
        return result

    return norms
