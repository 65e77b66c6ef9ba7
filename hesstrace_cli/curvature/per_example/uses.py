"""The operations of a forward pass whose parameters have a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesstrace_cli.autodiff.graph import Params, topological
from hesstrace_cli.autodiff.layer_calls import LayerCall, calls_at
from hesstrace_cli.curvature.per_example.linearity import operation
from hesstrace_cli.curvature.per_example.registry import FUNCTION_RULES, NAMES, ROLES, RULES
from hesstrace_cli.curvature.per_example.rules.broadcast import broadcast, lead
from hesstrace_cli.curvature.per_example.rules.layout import Layout, Norms, NormsOf, output_shape
from hesstrace_cli.curvature.per_example.rules.operands import with_weights
from hesstrace_cli.curvature.per_example.users_rules import rule_of_function, rule_of_layer

Seen = Callable[[Tensor], Tensor]
"""What is done with a parameter, of which no number changes, before an operation takes it."""


@dataclass
class Use:
    """An operation with parameters among its operands that are used nowhere else.

    Attributes:
        node: Of the graph.
        edge: Where its output's gradient g is read off.
        names: The names, by role, of those parameters.
        num_rows: R.
        norms: From the rows (R, ...) of g, their layout and what scales the entries of a gradient
            to squared norms (N,), by role.
        flatten: How many of g's leading dimensions make up the rows.
        seen: By role how the operation sees a parameter, as its transpose or in another shape.
        users: What a user's rule is of, as "layer Scale"; nothing where the rule is built in.
    """

    node: Any
    edge: GradientEdge
    names: dict[str, str]
    num_rows: int
    norms: NormsOf
    flatten: int = 1
    seen: Mapping[str, Seen] = field(default_factory=dict)
    users: str = ""

    @property
    def kind(self) -> str:
        """What has the rule."""
        return self.users or NAMES[operation(self.node)]

    def squares(self, g: Tensor, layout: Layout, scales: Params | None = None) -> Norms:
        """||s J_i^T u_i||^2 of every example, (N,) by name.

        Args:
            g: The gradient of the operation's output.
            layout: Of its rows.
            scales: s by name, 0-dim or of the parameter's shape, those that are wanted; 1 for all
                where it is None.
        """
        wanted = self.names.items() if scales is None else [
            (role, name) for role, name in self.names.items() if name in scales
        ]  # fmt: skip
        own: dict[str, Tensor | None] = {}
        for role, name in wanted:
            scale = None if scales is None else scales[name]
            own[role] = None if scale is None or not scale.dim() else self.seen[role](scale)
        norms = self.norms(self.rows(g), layout, own)
        result = {name: norms[role] for role, name in wanted}
        if scales is None:
            return result
        return {n: v if scales[n].dim() else v * scales[n].square() for n, v in result.items()}

    def rows(self, g: Tensor) -> Tensor:
        """G as rows (R, ...)."""
        return g.flatten(0, self.flatten - 1)


def find_uses(logits: Tensor, params: Params) -> list[Use]:
    """The operations of a forward pass whose parameters have a rule and are used once.

    Args:
        logits: The output of the pass, with the graph that it has recorded.
        params: The parameters of interest by name.
    """
    names = {id(p): name for name, p in params.items()}
    leaf_of: dict[Any, str] = {}  # a parameter's node, or that of its transpose, cast or view
    seen: dict[Any, Seen] = {}
    consumers: dict[str, list[tuple[Any, int]]] = {name: [] for name in params}
    calls: list[tuple[Any, LayerCall]] = []
    outer: dict[Any, Any] = {}  # what has the output of a node, where it is another
    for node in topological(logits):
        calls += ((node, call) for call in calls_at(node))
        if hasattr(node, "variable"):
            if id(node.variable) in names:
                leaf_of[node] = names[id(node.variable)]
                seen[node] = _as_it_is
            continue
        inputs = [following for following, _ in node.next_functions]
        if with_weights(node) is not node:
            outer[with_weights(node)] = node
        if inputs and inputs[0] in leaf_of and operation(node) in _SEEN:
            leaf_of[node] = leaf_of[inputs[0]]
            seen[node] = _after(seen[inputs[0]], _SEEN[operation(node)](node))
            continue
        for place, following in enumerate(inputs):
            if following in leaf_of:
                consumers[leaf_of[following]].append((node, place))
    found = list(_of_layers(calls, names, consumers))
    done = {name for use in found for name in use.names.values()}
    roles: dict[Any, dict[str, str]] = {}
    for name, places in consumers.items():
        if len(places) == 1 and name not in done:
            node, place = places[0]
            role = str(place) if _is_users(node) else ROLES.get(operation(node), {}).get(place)
            if role is not None:
                roles.setdefault(node, {}).setdefault(role, name)
    uses = (
        _use_of_function(node, own, seen)
        if _is_users(node)
        else _use(node, own, seen, outer.get(node, node))
        for node, own in roles.items()
    )
    return found + [use for use in uses if use is not None]


def _is_users(node: Any) -> bool:
    return getattr(type(node), "_forward_cls", None) in FUNCTION_RULES


def _of_layers(
    calls: list[tuple[Any, LayerCall]], names: Mapping[int, str],
    consumers: Mapping[str, list[tuple[Any, int]]],
) -> Iterator[Use]:  # fmt: skip
    """Layers with a rule, and those of their parameters that nothing else uses."""
    done: set[str] = set()
    for node, call in calls:
        inside = call.inside(node) if call.is_intact else set()
        own = {
            role: name for role, p in call.params.items()
            if (name := names.get(id(p))) is not None and name not in done and consumers[name]
            and all(consumer in inside for consumer, _ in consumers[name])
        }  # fmt: skip
        if own and (shape := list(node._input_metadata[call.place].shape)):
            done |= set(own.values())
            kind, norms = rule_of_layer(call)
            seen = dict.fromkeys(own, _as_it_is)
            yield Use(node, GradientEdge(node, call.place), own, shape[0], norms, 1, seen, kind)


def _use_of_function(node: Any, names: dict[str, str], seen: Mapping[Any, Seen]) -> Use | None:
    shape = output_shape(node)
    shapes = {role: _shape_at(node, int(role)) for role in names}
    found = rule_of_function(node, shapes) if shape else None
    if found is None:
        return None
    kind, norms = found
    own = {role: seen[node.next_functions[int(role)][0]] for role in names}
    return Use(node, GradientEdge(node, 0), names, shape[0], norms, 1, own, kind)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _after(first: Seen, then: Seen) -> Seen:
    return lambda tensor: then(first(tensor))


def _as_view(node: Any) -> Seen:
    shape = output_shape(node)
    return lambda tensor: tensor.reshape(shape)


_SEEN: dict[str, Callable[[Any], Seen]] = {
    "T": lambda _: lambda tensor: tensor.mT,
    "ToCopy": lambda _: _as_it_is,
    "View": _as_view,
    "Unsqueeze": _as_view,
    "ReshapeAlias": _as_view,
}


def _use(node: Any, names: dict[str, str], seen: Mapping[Any, Seen], outer: Any) -> Use | None:
    kind, flatten = operation(node), 1
    if node._input_metadata[0].dtype.is_complex:
        return None
    if kind in RULES:
        if "other" in names:  # a parameter where the activations should be
            return None
        norms = RULES[kind](node)
    else:
        place = next(i for i, (n, _) in enumerate(node.next_functions) if n in seen)
        operand = _shape_at(node, place)
        flatten = lead(node, operand)
        norms = broadcast(node, place, operand) if flatten else None
    if norms is None:
        return None
    shape = output_shape(node)
    if kind in ("NativeLayerNorm", "Embedding"):
        flatten = len(shape) - (1 if kind == "Embedding" else len(node._saved_normalized_shape))
    num_rows = math.prod(shape[:flatten])
    own = {
        role: seen[node.next_functions[place][0]] for place, role in ROLES[kind].items()
        if role in names and node.next_functions[place][0] in seen
    }  # fmt: skip
    return Use(node, GradientEdge(outer, 0), names, num_rows, norms, flatten, own)


def _shape_at(node: Any, place: int) -> list[int]:
    """The shape of a parameter as an operation sees it."""
    operand = node.next_functions[place][0]
    own = getattr(operand, "variable", None)
    return output_shape(operand) if own is None else list(own.shape)
