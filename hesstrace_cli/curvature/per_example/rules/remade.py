"""What is made again for its derivative, so that nothing of it is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def remade(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function of tensors, to be differentiated once."""
    result: Tensor = _Remade.apply(function, *tensors)
    return result


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.function = function
        return function(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Any:
        needs = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            inputs = [
                t.detach().requires_grad_(asked)
                for t, asked in zip(ctx.saved_tensors, needs, strict=True)
            ]
            made = ctx.function(*inputs)
        asked = [t for t in inputs if t.requires_grad]
        grads = iter(torch.autograd.grad(made, asked, slope, allow_unused=True))
        return None, *(next(grads) if need else None for need in needs)
