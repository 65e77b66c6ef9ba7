"""Convolutions of any kind, a layer at a time by the cheapest of three ways.

Where positions are few, by Gram matrices: of the patches, unfolded, or of the pixels that they
share. Where they are many, by every example's gradient: a convolution in groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
from hesstrace_cli.curvature.per_example.rules.operands import kernel_of, operands
from hesstrace_cli.curvature.per_example.rules.outer import Outer, gram_is_cheaper, gram_norms
from hesstrace_cli.curvature.per_example.rules.own_weights import own_weight_norms
from hesstrace_cli.curvature.per_example.rules.pixels import PixelWindows
from hesstrace_cli.curvature.per_example.rules.unfolding import unfolded

_FEW = 32
"""Examples for which a GPU convolves in groups faster than it unfolds and multiplies.

The number of `torch.nn.utils._expanded_weights`.
"""
_SUM = 32
"""Products that take the time of adding two numbers of large matrices, roughly."""


def convolution(node: Any) -> NormsOf | None:
    """x_l is the l-th patch of the input or, transposed, of g."""
    return _Convolution(node).norms


class _Convolution:
    def __init__(self, node: Any) -> None:
        self.kernel = kernel_of(node)
        self.X: Any
        self.X, self.W = operands(node)
        self._remembered: dict[Layout, Outer] = {}

    def norms(self, g: Tensor, layout: Layout, scales: Scales) -> Norms:
        """By role, (N,)."""
        result: Norms = {}
        if "bias" in scales:
            summed = in_full(layout.group(g)).flatten(3).sum((1, 3))
            result["bias"] = total_squares(summed, scales["bias"])
        if self.X is not None and "weight" in scales:
            result["weight"] = self._of_weight(g, layout, scales["weight"])
        return result

    def _of_weight(self, g: Tensor, layout: Layout, scale: Tensor | None) -> Tensor:
        image, other = self._operands(g, self.X)
        num_images = len(g) // layout.num_examples
        positions, groups = num_images * other[0, 0].numel(), self.kernel.groups
        window, c = self.W[0, 0].numel(), image.shape[1] // groups
        k, d = other.shape[1] // groups, c * window
        recorded = is_recorded(g, self.X)
        is_slow = g.is_cuda and layout.num_examples >= _FEW
        if scale is None and recorded and not is_slow:
            pixels = self._windows(other, num_images)
            squares = pixels.num_pixels**2 * c + positions**2 * k
            sums = 0 if pixels.is_point else 2 * _SUM * window * positions**2
            if 2 * squares + sums < 3 * positions * k * d:
                return self._by_pixels(g, layout, pixels)
        elif (
            scale is None
            and self.W.dim() < 5
            and (is_slow or gram_is_cheaper(positions, k, d, recorded=recorded))
        ):
            return self._by_unfolding(g, layout)
        return self._by_groups(g, layout, scale)

    def _operands(self, g: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        """What the window moves over, and what there is at each of its positions."""
        return (g, X) if self.kernel.transposed else (X, g)

    def _windows(self, other: Tensor, num_images: int) -> PixelWindows:
        kernel = self.kernel
        return PixelWindows(
            self.W.shape[2:], kernel.stride, kernel.dilation, kernel.padding, other.shape[2:],
            num_images,
        )  # fmt: skip

    def _vectors(self, layout: Layout, columns: Rows) -> Rows:
        """From (R, C, ...) to (N * groups, positions of all rows, channels or patch)."""

        def rows(images: Tensor) -> Tensor:
            split = columns(images).flatten(2).unflatten(1, (self.kernel.groups, -1))
            grouped = layout.group(split)  # (N, L, groups, d, places)
            return grouped.permute(0, 2, 1, 4, 3).flatten(2, 3).flatten(0, 1)

        return rows

    def _by_pixels(self, g: Tensor, layout: Layout, windows: PixelWindows) -> Tensor:
        image, other = self._operands(g, self.X)
        norms = gram_norms(
            other, image, self._vectors(layout, _as_it_is), self._vectors(layout, windows.pixels),
            windows,
        )  # fmt: skip
        return norms.unflatten(0, (-1, self.kernel.groups)).sum(1)

    def _by_unfolding(self, g: Tensor, layout: Layout) -> Tensor:
        image, other = self._operands(g, self.X)
        positions = len(g) // layout.num_examples * other[0, 0].numel()
        per_example = positions * image.shape[1] * self.W[0, 0].numel()
        return self._in_parts(self._unfolded_norms, per_example, g, layout)

    def _unfolded_norms(self, g: Tensor, X: Tensor, layout: Layout) -> Tensor:
        image, other = self._operands(g, X)
        outer = self._remembered.get(layout) if X is self.X else None
        if outer is None:
            size, places = self.W.shape[2:], other.shape[2:]
            patches = self._vectors(layout, lambda x: unfolded(x, size, self.kernel, places))
            outer = Outer(image, patches)
            if X is self.X and not self.kernel.transposed:
                self._remembered[layout] = outer
        norms = outer.norms(other, self._vectors(layout, _as_it_is))
        return norms.unflatten(0, (-1, self.kernel.groups)).sum(1)

    def _by_groups(self, g: Tensor, layout: Layout, scale: Tensor | None) -> Tensor:
        def norms(g: Tensor, X: Tensor, layout: Layout) -> Tensor:
            return own_weight_norms(g, X, layout, self.kernel, self.W.shape, scale)

        return self._in_parts(norms, self.W.numel(), g, layout)

    def _in_parts(
        self, norms: Callable[[Tensor, Tensor, Layout], Tensor], numbers: int, g: Tensor,
        layout: Layout,
    ) -> Tensor:  # fmt: skip
        """Some examples at a time, of which each has a temporary of so many numbers."""
        size = at_once(numbers)
        if size >= layout.num_examples or is_recorded(g, self.X):
            return norms(g, self.X, layout)
        indices = layout.group(torch.arange(len(g), device=g.device))
        return torch.cat([
            norms(g[at.flatten()], self.X[at.flatten()], Layout(len(at)))
            for at in indices.split(size)
        ])  # fmt: skip


def _as_it_is(images: Tensor) -> Tensor:
    return images
