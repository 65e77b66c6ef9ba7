"""Which operation, and which layer of a user's, has which rule.

A user's rule gives every example's gradient of its parameters from the gradient of the output:

    @norm_rule(Scale)
    def gradients(layer, g, x):
        return {"weight": g * x}

The squared norms are taken of them. Where such a gradient is a sum of outer products, as of a
linear layer over positions, `OuterProducts` saves making it. docs/how-to/norm-rule.md has both
kinds; `hesstrace verify` holds every rule that a model uses against autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hesstrace_cli.autodiff import layer_calls
from hesstrace_cli.autodiff.convolution import OF_WEIGHTS
from hesstrace_cli.autodiff.differentiable import HELD_BATCH_NORM
from hesstrace_cli.curvature.per_example.rules.convolution import convolution
from hesstrace_cli.curvature.per_example.rules.embedding import embedding
from hesstrace_cli.curvature.per_example.rules.layout import NormsOf
from hesstrace_cli.curvature.per_example.rules.linear import linear
from hesstrace_cli.curvature.per_example.rules.norm_layers import (
    GROUP_NORMS,
    batch_norm,
    group_norm,
    held_batch_norm,
    layer_norm,
)
from hesstrace_cli.curvature.per_example.rules.operands import CONVOLUTIONS
from hesstrace_cli.errors import ModelError


@dataclass(frozen=True)
class OuterProducts:
    """Every row's gradient sum_l g_l x_l^T of a weight of k d entries.

    Attributes:
        G: Shape (R, L, k).
        X: Shape (R, L, d).
    """

    G: Tensor
    X: Tensor


Gradients = Mapping[Any, Tensor | OuterProducts]
UsersRule = Callable[..., Gradients]
_Rule = TypeVar("_Rule", bound=UsersRule)

LAYER_RULES: dict[type[nn.Module], UsersRule] = {}
FUNCTION_RULES: dict[type[torch.autograd.Function], UsersRule] = {}


def norm_rule(kind: type) -> Callable[[_Rule], _Rule]:
    """Register, as a decorator, the rule of a layer or of an operation.

    Of a layer, a class of modules, not of its subclasses, it is called with the module, the
    gradient g of its output and what its forward was called with; it gives for each trainable
    parameter, by its name in the module, the gradients of all rows. Of an operation, a
    `torch.autograd.Function`, it is called with the `ctx` that its backward gets, and g; it gives
    them by the place among its tensor arguments.

    The rows are the first dimension of the output, (R, ...), one or more for each example, and
    must not touch each other in it. What is computed must be differentiable, as the penalty is:
    no `detach`, no `.data`. A parameter used elsewhere too is left to the whole-batch form.

    Args:
        kind: The class.

    Raises:
        ModelError: If it is neither.
    """
    is_class = isinstance(kind, type)
    if not is_class or not issubclass(kind, nn.Module | torch.autograd.Function):
        raise ModelError(
            f"norm_rule({kind!r}): expected a class of layers (nn.Module) or of operations "
            "(torch.autograd.Function)"
        )

    def register(rule: _Rule) -> _Rule:
        if issubclass(kind, nn.Module):
            LAYER_RULES[kind] = rule
            layer_calls.note(kind)
        else:
            FUNCTION_RULES[kind] = rule
        return rule

    return register


_OF_WEIGHTS = f"autograd.Function {OF_WEIGHTS}"
_HELD = f"autograd.Function {HELD_BATCH_NORM}"
# The role of a parameter by its place among an operation's inputs:
ROLES: dict[str, dict[int, str]] = {
    "Addmm": {0: "bias", 1: "other", 2: "weight"},
    "Mm": {0: "other", 1: "weight"},
    "Convolution": {1: "weight", 2: "bias"},
    _OF_WEIGHTS: {0: "weight", 1: "bias"},
    "NativeBatchNorm": {1: "weight", 2: "bias"},
    "CudnnBatchNorm": {1: "weight", 2: "bias"},
    _HELD: {1: "weight", 2: "bias"},
    "NativeLayerNorm": {1: "weight", 2: "bias"},
    **{name: {1: "weight", 2: "bias"} for name in GROUP_NORMS},
    "Embedding": {0: "weight"},
    "Mul": {0: "weight", 1: "weight"},
    "Add": {0: "weight", 1: "weight"},
}


# What users know them as, whatever kernel a device has:
NAMES = {
    **dict.fromkeys(("Addmm", "Mm"), "linear layers"),
    **dict.fromkeys(CONVOLUTIONS, "convolutions"),
    **dict.fromkeys(("NativeBatchNorm", "CudnnBatchNorm", _HELD), "batch norm"),
    "NativeLayerNorm": "layer norm",
    **dict.fromkeys(GROUP_NORMS, "group norm"),
    "Embedding": "embeddings",
    "Mul": "products",
    "Add": "sums",
}
RULES: dict[str, Callable[[Any], NormsOf | None]] = {
    "Addmm": linear,
    "Mm": linear,
    **dict.fromkeys(CONVOLUTIONS, convolution),
    "NativeBatchNorm": batch_norm,
    "CudnnBatchNorm": batch_norm,
    _HELD: held_batch_norm,
    "NativeLayerNorm": layer_norm,
    **dict.fromkeys(GROUP_NORMS, group_norm),
    "Embedding": embedding,
}
