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

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hesstrace_cli.autodiff.differentiable import HELD_BATCH_NORM
from hesstrace_cli.curvature.per_example.linearity import operation

_HELD = f"autograd.Function {HELD_BATCH_NORM}"
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


Scales = Mapping[str, Tensor | None]
"""The roles whose norms are wanted, and what multiplies each entry of a gradient first, if any."""
NormsOf = Callable[[Tensor, Layout, Scales], Norms]


Rows = Callable[[Tensor], Tensor]
"""From what autograd has saved to the rows (N, L, d) of every example."""


def in_full(tensor: Tensor) -> Tensor:
    """In single precision at least: squares of half-precision numbers overflow."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def total_squares(gradients: Tensor, scale: Tensor | None) -> Tensor:
    """||s P_i||^2 for every example's gradient P_i, from (N, ...) to (N,)."""
    gradients = in_full(gradients)
    scaled = gradients if scale is None else gradients * scale
    return scaled.flatten(1).square().sum(1)


class Outer:
    """||sum_l g_l x_l^T||^2 for one set of x and one g after another.

    Args:
        rows: Gives x, shape (N, L, d), from `source`.
        source: A tensor.
    """

    def __init__(self, source: Tensor, rows: Rows) -> None:
        self.source, self.rows = source, rows
        self.X = rows(source)
        self._gram: Tensor | None = None

    def norms(self, source: Tensor, rows: Rows, scale: Tensor | None = None) -> Tensor:
        """The squared norms (N,), by the cheaper of the two forms.

        Args:
            source: A tensor.
            rows: Gives G, shape (N, L, k), from it.
            scale: Multiplies the entries of the gradient, shape (k, d).
        """
        G, X = rows(source), self.X
        N, L, k = G.shape
        d = X.shape[2]
        if L == 1:
            return _norms_of_rows(G[:, 0], X[:, 0], scale)
        recorded = is_recorded(G, X)
        if scale is not None or not gram_is_cheaper(L, k, d, recorded=recorded):
            if recorded:
                return total_squares(G.mT @ X, scale)
            return _in_chunks(lambda g, x: total_squares(g.mT @ x, scale), k * d, G, X)
        if recorded:
            norms: Tensor = _GramNorms.apply(source, self.source, rows, self.rows)
            return norms
        if N * L * L > CHUNK:
            return _in_chunks(lambda g, x: ((g @ g.mT) * (x @ x.mT)).sum((1, 2)), L * L, G, X)
        if self._gram is None:
            self._gram = X @ X.mT
        return ((G @ G.mT) * self._gram).sum((1, 2))


def is_recorded(*tensors: Tensor) -> bool:
    """Whether what is done with them will be differentiated."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def gram_is_cheaper(L: int, k: int, d: int, *, recorded: bool) -> bool:
    """Whether (g g^T) * (x x^T) takes fewer products than g^T x does, L by k and L by d.

    Differentiated, the former takes four products of L L k or L L d numbers, the latter three of
    L k d; else g^T x is one, and x x^T is shared by many g.
    """
    return 2 * L * (k + d) < 3 * k * d if recorded else L * k + L * L <= k * d


def _norms_of_rows(G: Tensor, X: Tensor, scale: Tensor | None) -> Tensor:
    """||s * (g x^T)||^2 of one row an example."""
    G, X = in_full(G).square(), in_full(X).square()
    if scale is None:
        return G.sum(1) * X.sum(1)
    return ((G @ scale.square()) * X).sum(1)


class _GramNorms(torch.autograd.Function):
    """sum_{l,l'} (g_l . g_l') (x_l . x_l'), of which only the two Gram matrices are held.

    Its derivative in g is 2 (x x^T) g, that in x is 2 (g g^T) x; g and x are made again for it.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, rows_of_g: Rows, rows_of_x: Rows) -> Tensor:
        G, X = in_full(rows_of_g(g)), in_full(rows_of_x(x))
        gram_of_g, gram_of_x = G @ G.mT, X @ X.mT
        ctx.save_for_backward(g, x, gram_of_g, gram_of_x)
        ctx.rows = rows_of_g, rows_of_x
        return (gram_of_g * gram_of_x).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        g, x, gram_of_g, gram_of_x = ctx.saved_tensors
        rows_of_g, rows_of_x = ctx.rows
        needs_g, needs_x = ctx.needs_input_grad[:2]
        twice = 2 * slope[:, None, None]
        of_g = _pulled(rows_of_g, g, twice * gram_of_x) if needs_g else None
        of_x = _pulled(rows_of_x, x, twice * gram_of_g) if needs_x else None
        return of_g, of_x, None, None


def _pulled(rows: Rows, source: Tensor, gram: Tensor) -> Tensor:
    """The gradient in `source` where that in its rows is the Gram matrix times them."""
    with torch.enable_grad():
        source = source.detach().requires_grad_()
        made = rows(source)
    with torch.no_grad():
        slope = (gram @ in_full(made)).to(made.dtype)
    (grad,) = torch.autograd.grad(made, source, slope)
    return grad


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

    def norms(g: Tensor, layout: Layout, scales: Scales) -> Norms:
        result: Norms = {}
        if "bias" in scales:
            result["bias"] = total_squares(in_full(layout.group(g)).sum(1), scales["bias"])
        if "weight" in scales and X is not None:  # saved only where the weight needs a gradient
            if layout not in outer:
                outer[layout] = Outer(X, layout.group)
            scale = scales["weight"]  # of the factor (d, k)
            own = None if scale is None else scale.mT
            result["weight"] = outer[layout].norms(g, layout.group, own)
        return result

    return norms


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


def _convolution(node: Any) -> NormsOf | None:
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
        size = max(1, CHUNK // per_example)
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

        size = max(1, CHUNK // W.numel())
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


def _embedding(node: Any) -> NormsOf | None:
    if node._saved_scale_grad_by_freq:
        return None
    indices, padding = node._saved_indices.flatten(), node._saved_padding_idx

    def norms(g: Tensor, layout: Layout, scales: Scales) -> Norms:
        def of(G: Tensor, at: Tensor) -> Tensor:
            return (G * ((at[:, :, None] == at[:, None, :]).to(G) @ G)).sum((1, 2))

        at, scale = layout.group(indices), scales["weight"]
        G = in_full(layout.group(g)) * (at != padding)[..., None]
        G = G if scale is None else G * scale[at]
        return {"weight": _in_chunks(of, at.shape[1] ** 2, G, at)}

    return norms


class _Normalized(torch.autograd.Function):
    """(x - mean) / std over the last dimension, the two given; its derivative is that of them too.

    With rstd = (var + eps)^(-1/2) it is rstd (g - mean(g) - y mean(g y)), whatever eps is.
    """

    @staticmethod
    def forward(ctx: Any, X: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        Y = (X - mean) * rstd
        ctx.save_for_backward(Y, rstd)
        return Y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        Y, rstd = ctx.saved_tensors
        of_X = g - g.mean(-1, keepdim=True) - Y * (g * Y).mean(-1, keepdim=True)
        return rstd * of_X, None, None


def affine(num_channels: int, normalized: Callable[[], Tensor]) -> NormsOf:
    """A scale and a shift of what a norm gives, in the shape (R, channels, positions).

    Args:
        num_channels: Those that have a scale and a shift each.
        normalized: Gives that.
    """

    def norms(g: Tensor, layout: Layout, scales: Scales) -> Norms:
        def norm(products: Tensor, scale: Tensor | None) -> Tensor:
            own = None if scale is None else scale.flatten()
            return total_squares(layout.group(products).sum((1, 3)), own)

        result: Norms = {}
        g = in_full(g)
        if "weight" in scales:
            Y = in_full(normalized())
            result["weight"] = norm(g.reshape(Y.shape) * Y, scales["weight"])
        if "bias" in scales:
            result["bias"] = norm(g.reshape(len(g), num_channels, -1), scales["bias"])
        return result

    return norms


def by_channel(X: Tensor) -> Tensor:
    """From (R, C, ...) to (R, C, positions), in single precision at least."""
    return in_full(X).reshape(*X.shape[:2], -1)


def _batch_norm(node: Any) -> NormsOf | None:
    if node._saved_training:
        return None
    X = node._saved_input
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    mean, scale = node._saved_running_mean, torch.rsqrt(node._saved_running_var + eps)
    return affine(X.shape[1], lambda: (by_channel(X) - mean[:, None]) * scale[:, None])


def _held_batch_norm(node: Any) -> NormsOf:
    X, _, mean, rstd = node.saved_tensors
    return affine(X.shape[1], lambda: (by_channel(X) - mean[:, None]) * rstd[:, None])


def _layer_norm(node: Any) -> NormsOf | None:
    X, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    lead = X.dim() - len(node._saved_normalized_shape)
    if not lead:
        return None

    def normalized() -> Tensor:
        rows = in_full(X).flatten(lead).flatten(0, lead - 1)
        own: Tensor = _Normalized.apply(
            rows, mean.detach().reshape(-1, 1), rstd.detach().reshape(-1, 1)
        )
        return own[..., None]

    return affine(math.prod(X.shape[lead:]), normalized)


def _group_norm(node: Any) -> NormsOf | None:
    X, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2

    def normalized() -> Tensor:
        grouped = in_full(X).reshape(len(X), node._saved_group, -1)
        own: Tensor = _Normalized.apply(
            grouped, mean.detach()[..., None], rstd.detach()[..., None]
        )  # fmt: skip
        return own.reshape(*X.shape[:2], -1)

    return affine(X.shape[1], normalized)


def broadcast(node: Any, place: int, operand: Sequence[int]) -> NormsOf | None:
    """A parameter that is added to, or multiplied with, something larger."""
    if operation(node) == "Mul":
        factor = node._saved_other if place == 0 else node._saved_self
    elif node._saved_alpha == 1 or place == 0:
        factor = None
    else:
        return None
    size = output_shape(node)
    shape = [1] * (len(size) - len(operand)) + list(operand)
    summed = [d for d in range(lead(node, operand), len(size)) if shape[d] == 1]

    def norms(rows: Tensor, layout: Layout, scales: Scales) -> Norms:
        g = in_full(rows.reshape(size))
        g = g if factor is None else g * factor
        g = g.sum(summed, keepdim=True) if summed else g
        per_example = layout.group(g.reshape(len(rows), -1)).sum(1)
        scale = scales["weight"]
        return {"weight": total_squares(per_example, None if scale is None else scale.flatten())}

    return norms


def lead(node: Any, operand: Sequence[int]) -> int:
    """How many leading dimensions of the output a broadcast parameter lacks."""
    size = output_shape(node)
    shape = [1] * (len(size) - len(operand)) + list(operand)
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
    _HELD: {1: "weight", 2: "bias"},
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
    _HELD: _held_batch_norm,
    "NativeLayerNorm": _layer_norm,
    "NativeGroupNorm": _group_norm,
    "Embedding": _embedding,
}
