"""A parameter that is added to, or multiplied with, something larger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hesstrace_cli.curvature.per_example.linearity import operation
from hesstrace_cli.curvature.per_example.rules.layout import (
    Layout,
    Norms,
    NormsOf,
    Scales,
    in_full,
    output_shape,
    total_squares,
)


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
