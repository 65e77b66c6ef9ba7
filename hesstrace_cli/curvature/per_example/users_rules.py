"""Users' rules: from every row's gradient to every example's squared norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hesstrace_cli.autodiff.layer_calls import LayerCall
from hesstrace_cli.curvature.per_example.registry import (
    FUNCTION_RULES,
    LAYER_RULES,
    Gradients,
    OuterProducts,
)
from hesstrace_cli.curvature.per_example.rules.layout import (
    Layout,
    Norms,
    NormsOf,
    Scales,
    total_squares,
)
from hesstrace_cli.curvature.per_example.rules.outer import Outer
from hesstrace_cli.errors import ModelError

Shapes = Mapping[str, Sequence[int]]


def rule_of_layer(call: LayerCall) -> tuple[str, NormsOf]:
    """What the rule is called, and the norms by the parameters' names in the layer."""
    kind = type(call.layer)
    rule, name = LAYER_RULES[kind], f"layer {kind.__name__}"
    return name, _norms(
        name, lambda g: rule(call.layer, g, *call.args, **call.kwargs),
        {role: p.shape for role, p in call.params.items()},
    )  # fmt: skip


def rule_of_function(node: Any, shapes: Shapes) -> tuple[str, NormsOf] | None:
    """The same of a user's `autograd.Function` that has a rule.

    Args:
        node: Of the graph.
        shapes: Of the parameters, as it sees them, by their places among its tensor arguments.
    """
    kind = getattr(type(node), "_forward_cls", None)
    if kind not in FUNCTION_RULES or len(node._input_metadata) != 1:
        return None
    rule, name = FUNCTION_RULES[kind], f"operation {kind.__name__}"

    def gradients(g: Tensor) -> Gradients:
        return {str(place): each for place, each in rule(node, g).items()}

    return name, _norms(name, gradients, shapes)


def _norms(name: str, gradients: Callable[[Tensor], Gradients], shapes: Shapes) -> NormsOf:
    def norms(g: Tensor, layout: Layout, scales: Scales) -> Norms:
        given = gradients(g)
        result: Norms = {}
        for role, scale in scales.items():
            if role not in given:
                raise ModelError(
                    f"the norm rule of {name} gives nothing for {role!r}, expected a gradient for "
                    "every trainable parameter"
                )
            result[role] = _squares(name, role, given[role], shapes[role], layout, scale)
        return result

    return norms


def _squares(
    name: str, role: str, given: Tensor | OuterProducts, shape: Sequence[int], layout: Layout,
    scale: Tensor | None,
) -> Tensor:  # fmt: skip
    if isinstance(given, OuterProducts):
        k, d = given.G.shape[2], given.X.shape[2]
        if k * d != math.prod(shape):
            raise ModelError(
                f"the norm rule of {name} gives outer products of {k} by {d} numbers for {role!r}, "
                f"expected {math.prod(shape)} as in {tuple(shape)}"
            )

        def rows(tensor: Tensor) -> Tensor:
            return layout.group(tensor).flatten(1, 2)

        own = None if scale is None else scale.reshape(k, d)
        return Outer(given.X, rows).norms(given.G, rows, own)
    if list(given.shape[1:]) != list(shape):
        raise ModelError(
            f"the norm rule of {name} gives {tuple(given.shape)} for {role!r}, expected "
            f"a gradient for each row, (R, {', '.join(map(str, shape))})"
        )
    return total_squares(layout.group(given).sum(1), scale)
