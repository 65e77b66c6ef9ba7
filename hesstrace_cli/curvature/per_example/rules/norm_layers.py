"""The scales and shifts of batch, layer and group norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from hesstrace_cli.autodiff.group_norm import GROUP_NORM
from hesstrace_cli.curvature.per_example.rules.layout import (
    Layout,
    Norms,
    NormsOf,
    Scales,
    in_full,
    total_squares,
)
from hesstrace_cli.curvature.per_example.rules.remade import remade

GROUP_NORMS = ("NativeGroupNorm", f"autograd.Function {GROUP_NORM}")
"""The names of their nodes."""


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


def affine(num_channels: int, normalized: Callable[..., Tensor], *sources: Tensor) -> NormsOf:
    """A scale and a shift of what a norm gives.

    Args:
        num_channels: Those that have a scale and a shift each.
        normalized: Gives that from its sources, shape (R, channels, positions).
        sources: Tensors.
    """

    def norms(g: Tensor, layout: Layout, scales: Scales) -> Norms:
        def of_scale(g: Tensor, *sources: Tensor) -> Tensor:
            Y = in_full(normalized(*sources))
            products = (in_full(g).reshape(Y.shape) * Y).sum(-1)
            return total_squares(layout.group(products).sum(1), flat(scales["weight"]))

        def of_shift(g: Tensor) -> Tensor:
            summed = in_full(g).reshape(len(g), num_channels, -1).sum(-1)
            return total_squares(layout.group(summed).sum(1), flat(scales["bias"]))

        def flat(scale: Tensor | None) -> Tensor | None:
            return None if scale is None else scale.flatten()

        result: Norms = {}
        if "weight" in scales:
            result["weight"] = remade(of_scale, g, *sources)
        if "bias" in scales:
            result["bias"] = of_shift(g)
        return result

    return norms


def by_channel(X: Tensor) -> Tensor:
    """From (R, C, ...) to (R, C, positions), in single precision at least."""
    return in_full(X).reshape(*X.shape[:2], -1)


def _standardized(X: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (by_channel(X) - mean[:, None]) * rstd[:, None]


def batch_norm(node: Any) -> NormsOf | None:
    """Batch norm with statistics of its own."""
    if node._saved_training:
        return None
    X = node._saved_input
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    mean, scale = node._saved_running_mean, torch.rsqrt(node._saved_running_var + eps)
    return affine(X.shape[1], _standardized, X, mean, scale)


def held_batch_norm(node: Any) -> NormsOf:
    """Batch norm by the batch's statistics, held."""
    X, _, mean, rstd = node.saved_tensors
    return affine(X.shape[1], _standardized, X, mean, rstd)


def layer_norm(node: Any) -> NormsOf | None:
    """Layer norm."""
    X, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    lead = X.dim() - len(node._saved_normalized_shape)
    if not lead:
        return None
    mean, rstd = mean.detach().reshape(-1, 1), rstd.detach().reshape(-1, 1)

    def normalized(X: Tensor) -> Tensor:
        rows = in_full(X).flatten(lead).flatten(0, lead - 1)
        own: Tensor = _Normalized.apply(rows, mean, rstd)
        return own[..., None]

    return affine(math.prod(X.shape[lead:]), normalized, X)


def group_norm(node: Any) -> NormsOf | None:
    """Group norm."""
    if isinstance(node, BackwardCFunction):
        own: Any = node
        (X, _, mean, rstd), num_groups = own.saved_tensors, own.num_groups
    else:
        X, num_groups = node._saved_input, node._saved_group
        mean, rstd = node._saved_result1, node._saved_result2
    mean, rstd = mean.detach()[..., None], rstd.detach()[..., None]

    def normalized(X: Tensor) -> Tensor:
        grouped = in_full(X).reshape(len(X), num_groups, -1)
        own: Tensor = _Normalized.apply(grouped, mean, rstd)
        return own.reshape(*X.shape[:2], -1)

    return affine(X.shape[1], normalized, X)
