"""The squared norm of every example's gradient, operation by operation, from its output's gradient.

With rows x_l and gradients g_l at the positions l of one example, a weight's gradient is a sum of
outer products, and its norm

    || sum_l g_l x_l^T ||^2   =   sum_{l,l'} (g_l . g_l') (x_l . x_l')

for linear layers, convolutions (x_l the l-th patch) and embeddings; for norms and biases it is
that of a plain sum. Each rule reads what autograd has saved at the operation's node of the graph.

Source:
    Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799, for linear layers;
    Rochette et al., arXiv 1912.06015, for convolutions; the Gram form is
    Li, Tramèr, Liang, Hashimoto, arXiv 2110.05679.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hesstrace_cli.curvature.per_example.linearity import operation

CHUNK = 1 << 24
"""Numbers in the largest temporary tensor of a rule (64 MiB in float32)."""


Norms = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How the R = N L rows of an operation belong to the N examples.

    Attributes:
        num_examples: N.
        strided: Whether example i has the rows i, i + N, ... (sequence first) and not
            i L, ..., i L + L - 1 (batch first).
    """

    num_examples: int
    strided: bool = False

    def group(self, rows: Tensor) -> Tensor:
        """From (R, ...) to (N, L, ...)."""
        if self.strided:
            return rows.unflatten(0, (-1, self.num_examples)).transpose(0, 1)
        return rows.unflatten(0, (self.num_examples, -1))


NormsOf = Callable[[Tensor, Layout], Norms]


class Outer:
    """||sum_l g_l x_l^T||^2 for one set of x and one g after another.

    Args:
        X: Shape (N, L, d).
    """

    def __init__(self, X: Tensor) -> None:
        self.X = X
        self._gram: Tensor | None = None

    def norms(self, G: Tensor) -> Tensor:
        """The squared norms (N,) for G of shape (N, L, k), by the cheaper of the two forms."""
        N, L, k = G.shape
        d = self.X.shape[2]
        if L == 1:
            return G.square().sum((1, 2)) * self.X.square().sum((1, 2))
        if L * k + L * L > k * d:
            return _in_chunks(lambda g, x: (g.mT @ x).square().sum((1, 2)), k * d, G, self.X)
        if N * L * L > CHUNK:
            return _in_chunks(lambda g, x: ((g @ g.mT) * (x @ x.mT)).sum((1, 2)), L * L, G, self.X)
        if self._gram is None:
            self._gram = self.X @ self.X.mT
        return ((G @ G.mT) * self._gram).sum((1, 2))


def _in_chunks(function: Callable[..., Tensor], numbers: int, *tensors: Tensor) -> Tensor:
    """Apply it to chunks of examples; each example's temporary has so many numbers."""
    size = max(1, CHUNK // numbers)
    chunks = zip(*(t.split(size) for t in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])


def _linear(node: Any) -> NormsOf | None:
    addmm = operation(node) == "Addmm"
    if addmm and (node._saved_alpha != 1 or node._saved_beta != 1):
        return None
    X = node._saved_mat1 if addmm else node._saved_self
    outer: dict[Layout, Outer] = {}

    def norms(g: Tensor, layout: Layout) -> Norms:
        G = layout.group(g)
        result = {"bias": G.sum(1).square().sum(1)}
        if X is not None:  # it is saved only where the weight needs a gradient
            if layout not in outer:
                outer[layout] = Outer(layout.group(X))
            result["weight"] = outer[layout].norms(G)
        return result

    return norms


def _convolution(node: Any) -> NormsOf | None:
    X, W, groups = node._saved_input, node._saved_weight, node._saved_groups
    if W.dim() not in (3, 4):
        return None

    def two(values: Sequence[int], default: int) -> tuple[int, int]:
        return (default, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))

    window: dict[str, Any] = {
        "kernel_size": two(W.shape[2:], 1),
        "dilation": two(node._saved_dilation, 1),
        "padding": two(node._saved_padding, 0),
        "stride": two(node._saved_stride, 1),
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

    def vectors(images: Tensor, layout: Layout, places: Sequence[int] | None = None) -> Tensor:
        """From (R, C, H, W) to (N * groups, positions of all rows, channels or patch)."""
        columns = images.flatten(2) if places is None else unfolded(images, places)
        grouped = layout.group(columns.unflatten(1, (groups, -1)))  # (N, L, groups, d, positions)
        return grouped.permute(0, 2, 1, 4, 3).flatten(2, 3).flatten(0, 1)

    transposed = node._saved_transposed
    remembered: dict[Layout, Outer] = {}

    def weight(g: Tensor, x: Tensor, layout: Layout, whole: bool) -> Tensor:
        image, other = (g, x) if transposed else (x, g)
        outer = remembered.get(layout) if whole else None
        if outer is None:
            outer = Outer(vectors(image, layout, other.shape[2:]))
            if whole and not transposed:
                remembered[layout] = outer
        return outer.norms(vectors(other, layout)).unflatten(0, (-1, groups)).sum(1)

    def norms(g: Tensor, layout: Layout) -> Norms:
        result = {"bias": layout.group(g).flatten(3).sum((1, 3)).square().sum(1)}
        if X is None:
            return result
        N = layout.num_examples
        image = g if transposed else X
        positions = (X if transposed else g)[0, 0].numel()
        per_example = len(g) // N * positions * image.shape[1] * W[0, 0].numel()
        size = max(1, CHUNK // per_example)
        indices = layout.group(torch.arange(len(g), device=g.device))
        result["weight"] = weight(g, X, layout, True) if size >= N else torch.cat([
            weight(g[at.flatten()], X[at.flatten()], Layout(len(at)), False)
            for at in indices.split(size)
        ])  # fmt: skip
        return result

    return norms


def _embedding(node: Any) -> NormsOf | None:
    if node._saved_scale_grad_by_freq:
        return None
    indices, padding = node._saved_indices.flatten(), node._saved_padding_idx

    def norms(g: Tensor, layout: Layout) -> Norms:
        def of(G: Tensor, at: Tensor) -> Tensor:
            return ((G @ G.mT) * (at[:, :, None] == at[:, None, :])).sum((1, 2))

        at = layout.group(indices)
        G = layout.group(g) * (at != padding)[..., None]
        return {"weight": _in_chunks(of, at.shape[1] ** 2, G, at)}

    return norms


def _affine(normalized: Tensor) -> NormsOf:
    """A scale and a shift of what a norm gives, in the shape (R, channels, positions)."""

    def norms(g: Tensor, layout: Layout) -> Norms:
        def norm(products: Tensor) -> Tensor:
            return layout.group(products).sum((1, 3)).square().sum(1)

        g = g.reshape(normalized.shape)
        return {"weight": norm(g * normalized), "bias": norm(g)}

    return norms


def _batch_norm(node: Any) -> NormsOf | None:
    if node._saved_training:
        return None
    X = node._saved_input
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    mean, scale = node._saved_running_mean, torch.rsqrt(node._saved_running_var + eps)
    return _affine((X.reshape(*X.shape[:2], -1) - mean[:, None]) * scale[:, None])


def _layer_norm(node: Any) -> NormsOf | None:
    X = (node._saved_input - node._saved_result1) * node._saved_result2
    lead = X.dim() - len(node._saved_normalized_shape)
    return _affine(X.flatten(0, lead - 1).flatten(1)[..., None]) if lead else None


def _group_norm(node: Any) -> NormsOf | None:
    X, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    grouped = X.reshape(len(X), node._saved_group, -1)
    normalized = (grouped - mean[..., None]) * rstd[..., None]
    return _affine(normalized.reshape(*X.shape[:2], -1))


def broadcast(node: Any, place: int, leaf: Tensor) -> NormsOf | None:
    """A parameter that is added to, or multiplied with, something larger."""
    if operation(node) == "Mul":
        factor = node._saved_other if place == 0 else node._saved_self
    elif node._saved_alpha == 1 or place == 0:
        factor = None
    else:
        return None
    size = output_shape(node)
    shape = [1] * (len(size) - leaf.dim()) + list(leaf.shape)
    summed = [d for d in range(lead(node, leaf), len(size)) if shape[d] == 1]

    def norms(rows: Tensor, layout: Layout) -> Norms:
        g = rows.view(size)
        g = g if factor is None else g * factor
        g = g.sum(summed, keepdim=True) if summed else g
        per_row = g.reshape(len(rows), -1)
        return {"weight": layout.group(per_row).sum(1).square().sum(1)}

    return norms


def lead(node: Any, leaf: Tensor) -> int:
    """How many leading dimensions of the output a broadcast parameter lacks."""
    size = output_shape(node)
    shape = [1] * (len(size) - leaf.dim()) + list(leaf.shape)
    return next((d for d, length in enumerate(shape) if length != 1), len(size))


def output_shape(node: Any) -> list[int]:
    """The shape of what an operation gave."""
    return list(node._input_metadata[0].shape)


# The role of a parameter by its place among an operation's inputs:
ROLES: dict[str, dict[int, str]] = {
    "Addmm": {0: "bias", 1: "other", 2: "weight"},
    "Mm": {0: "other", 1: "weight"},
    "Convolution": {1: "weight", 2: "bias"},
    "NativeBatchNorm": {1: "weight", 2: "bias"},
    "CudnnBatchNorm": {1: "weight", 2: "bias"},
    "NativeLayerNorm": {1: "weight", 2: "bias"},
    "NativeGroupNorm": {1: "weight", 2: "bias"},
    "Embedding": {0: "weight"},
    "Mul": {0: "weight", 1: "weight"},
    "Add": {0: "weight", 1: "weight"},
}


RULES: dict[str, Callable[[Any], NormsOf | None]] = {
    "Addmm": _linear,
    "Mm": _linear,
    "Convolution": _convolution,
    "NativeBatchNorm": _batch_norm,
    "CudnnBatchNorm": _batch_norm,
    "NativeLayerNorm": _layer_norm,
    "NativeGroupNorm": _group_norm,
    "Embedding": _embedding,
}
