"""Group norm whose second derivative in reverse mode is one formula.

With x^ = (x - mean) / std over a group of n numbers, h = w g and the projection

    P u = u - mean(u) - x^ mean(u x^)

the gradient in x is P h / std. PyTorch differentiates that through a dozen recorded operations, all
of whose results it holds; here nothing is held but x and g.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, X: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int,
        eps: float, skips_weights: Callable[[], bool],
    ) -> Tensor:  # fmt: skip
        N, C = X.shape[:2]
        Y, mean, rstd = torch.native_group_norm(
            X, weight, bias, N, C, X[0, 0].numel(), num_groups, eps
        )
        ctx.save_for_backward(X, weight, mean, rstd)
        ctx.num_groups, ctx.has_bias, ctx.skips_weights = (
            num_groups,
            bias is not None,
            skips_weights,
        )
        return Y

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> Any:
        X, weight, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad
        asked = [needs[0], *((need and not ctx.skips_weights()) for need in needs[1:3])]
        grads = _Gradients.apply(g[0], X, weight, mean, rstd, ctx.num_groups, asked)
        return *grads, None, None, None


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, X: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
        num_groups: int, asked: list[bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        N, C = X.shape[:2]
        ctx.save_for_backward(g, X, weight, mean, rstd)
        ctx.num_groups = num_groups
        ctx.set_materialize_grads(False)
        g = g.contiguous()
        found = torch.ops.aten.native_group_norm_backward(
            g, X, mean, rstd, weight, N, C, X[0, 0].numel(), num_groups, asked
        )
        return tuple(each if ask else None for each, ask in zip(found, asked, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> Any:
        g, X, weight, mean, rstd = ctx.saved_tensors
        of_X, of_weight, of_bias = slopes
        N, C = X.shape[:2]
        by_group = (N, ctx.num_groups, -1)
        by_channel = (N, C, -1)
        rstd = rstd.reshape(N, ctx.num_groups, 1)
        Y = (X.reshape(by_group) - mean.reshape(N, ctx.num_groups, 1)) * rstd

        def mean_of(u: Tensor) -> Tensor:
            return u.mean(-1, keepdim=True)

        def projected(u: Tensor) -> Tensor:
            return u - mean_of(u) - Y * mean_of(u * Y)

        g = g.reshape(by_channel)
        w = None if weight is None else weight.reshape(1, C, 1)
        h = (g if w is None else g * w).reshape(by_group)
        of_g = of_Y = of_own_weight = grad_X = None
        if of_X is not None:
            v = of_X.reshape(by_group)
            Pv = projected(v)
            pushed = (rstd * Pv).reshape(by_channel)
            of_g = pushed if w is None else pushed * w
            of_own_weight = (g * pushed).sum((0, 2))
            of_Y = -rstd * (mean_of(v * Y) * h + mean_of(h * Y) * v)
            # And how 1/std moves: by <v, P h>, which is <P v, h>.
            grad_X = -rstd.square() * Y * mean_of(Pv * h)
        if of_weight is not None:
            own = of_weight.reshape(1, C, 1)
            by_weight = (own * g).reshape(by_group)
            of_Y = by_weight if of_Y is None else of_Y + by_weight
            through = own * Y.reshape(by_channel)
            of_g = through if of_g is None else of_g + through
        if of_bias is not None:
            shift = of_bias.reshape(1, C, 1)
            of_g = shift.expand_as(g) if of_g is None else of_g + shift
        if of_Y is not None:
            through_Y = rstd * projected(of_Y)
            grad_X = through_Y if grad_X is None else grad_X + through_Y

        def shaped(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.reshape(X.shape)

        weights = None if weight is None else of_own_weight
        return shaped(of_g), shaped(grad_X), weights, None, None, None, None


GROUP_NORM = _GroupNorm.__name__
"""The name of its nodes in a graph, whose first inputs are x, the weight and the bias."""


def group_norm(skips_weights: Callable[[], bool]) -> Callable[..., Tensor]:
    """`F.group_norm`, of which gradients of weights may be left out.

    Args:
        skips_weights: Asked in each backward pass.
    """

    def call(
        input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float = 1e-5, _cudnn_enabled: bool = True,
    ) -> Tensor:  # fmt: skip
        tensors = [t for t in (input, weight, bias) if t is not None]
        counts = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        same = all(t.dtype == input.dtype for t in tensors)
        if not counts or not same or not input.numel() or input.dim() < 2:
            return F.group_norm(input, num_groups, weight, bias, eps)
        output: Tensor = _GroupNorm.apply(
            input.contiguous(), weight, bias, num_groups, eps, skips_weights
        )
        return output

    return call
