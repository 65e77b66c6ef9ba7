"""The scales and shifts of batch, layer and group norms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hesstrace_cli.curvature.per_example.rules.layout import (
    Layout,
    Norms,
    NormsOf,
    Scales,
    in_full,
    total_squares,
)


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


def batch_norm(node: Any) -> NormsOf | None:
    """Batch norm with statistics of its own."""
    if node._saved_training:
        return None
    X = node._saved_input
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    mean, scale = node._saved_running_mean, torch.rsqrt(node._saved_running_var + eps)
    return affine(X.shape[1], lambda: (by_channel(X) - mean[:, None]) * scale[:, None])


def held_batch_norm(node: Any) -> NormsOf:
    """Batch norm by the batch's statistics, held."""
    X, _, mean, rstd = node.saved_tensors
    return affine(X.shape[1], lambda: (by_channel(X) - mean[:, None]) * rstd[:, None])


def layer_norm(node: Any) -> NormsOf | None:
    """Layer norm."""
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


def group_norm(node: Any) -> NormsOf | None:
    """Group norm."""
    X, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2

    def normalized() -> Tensor:
        grouped = in_full(X).reshape(len(X), node._saved_group, -1)
        own: Tensor = _Normalized.apply(
            grouped, mean.detach()[..., None], rstd.detach()[..., None]
        )  # fmt: skip
        return own.reshape(*X.shape[:2], -1)

    return affine(X.shape[1], normalized)
