"""Linear layers: rows x_l, gradients g_l."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hesstrace_cli.curvature.per_example.linearity import operation
from hesstrace_cli.curvature.per_example.rules.layout import (
    Layout,
    Norms,
    NormsOf,
    Scales,
    in_full,
    total_squares,
)
from hesstrace_cli.curvature.per_example.rules.outer import Outer


def linear(node: Any) -> NormsOf | None:
    """`Addmm` and `Mm`."""
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
