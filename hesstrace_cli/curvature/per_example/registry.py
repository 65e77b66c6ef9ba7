"""Which operation has which rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hesstrace_cli.autodiff.differentiable import HELD_BATCH_NORM
from hesstrace_cli.curvature.per_example.rules.convolution import convolution
from hesstrace_cli.curvature.per_example.rules.embedding import embedding
from hesstrace_cli.curvature.per_example.rules.layout import NormsOf
from hesstrace_cli.curvature.per_example.rules.linear import linear
from hesstrace_cli.curvature.per_example.rules.norm_layers import (
    batch_norm,
    group_norm,
    held_batch_norm,
    layer_norm,
)

_HELD = f"autograd.Function {HELD_BATCH_NORM}"

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
    "Addmm": linear,
    "Mm": linear,
    "Convolution": convolution,
    "NativeBatchNorm": batch_norm,
    "CudnnBatchNorm": batch_norm,
    _HELD: held_batch_norm,
    "NativeLayerNorm": layer_norm,
    "NativeGroupNorm": group_norm,
    "Embedding": embedding,
}
