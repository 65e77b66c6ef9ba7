"""The operations of a forward pass whose parameters have a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from hesstrace_cli.autodiff.graph import Params, topological
from hesstrace_cli.autodiff.layer_calls import LayerCall, calls_at
from hesstrace_cli.curvature.per_example.linearity import operation
from hesstrace_cli.curvature.per_example.registry import FUNCTION_RULES, NAMES, ROLES, RULES
from hesstrace_cli.curvature.per_example.rules.broadcast import broadcast, lead
from hesstrace_cli.curvature.per_example.rules.layout import (
    JointNormsOf,
    Layout,
    Norms,
    NormsOf,
    output_shape,
)
from hesstrace_cli.curvature.per_example.rules.operands import with_weights
from hesstrace_cli.curvature.per_example.rules.shared import Shared, shared_rule, takes_rows
from hesstrace_cli.curvature.per_example.users_rules import rule_of_function, rule_of_layer

Seen = Callable[[Tensor], Tensor]
"""What is done with a parameter, whose numbers are moved or left out, before an operation."""


@dataclass
class Use:
    """An operation, or several, with parameters among their operands that are used nowhere else.

    Attributes:
        nodes: Of the graph.
        edges: Where their outputs' gradients g are read off.
        names: The names, by role, of those parameters.
        rows_at: R of each, how many rows g has.
        norms: From the rows (R, ...) of each g, their layout and what scales the entries of a
            gradient to squared norms (N,), by role.
        flatten: How many of each g's leading dimensions make up the rows.
        seen: By role how the operation sees a parameter, as its transpose or in another shape.
        users: What a user's rule is of, as "layer Scale"; nothing where the rule is built in.
        shared: Of several operations what they have of the weight; None of one.
    """

    nodes: tuple[Any, ...]
    edges: tuple[GradientEdge, ...]
    names: dict[str, str]
    rows_at: tuple[int, ...]
    norms: JointNormsOf
    flatten: tuple[int, ...] = (1,)
    seen: Mapping[str, Seen] = field(default_factory=dict)
    users: str = ""
    shared: Shared | None = None

    @property
    def kind(self) -> str:
        """What has the rule."""
        if self.shared is not None:
            return self.shared.kind
        return self.users or NAMES[operation(self.nodes[0])]

    @property
    def takes_entries(self) -> bool:
        """Whether the entries of a gradient may be scaled one by one, without making it."""
        return self.shared is None or not self.shared.is_tied

    def squares(
        self, grads: Sequence[Tensor], layout: Layout, scales: Params | None = None
    ) -> Norms:
        """||s J_i^T u_i||^2 of every example, (N,) by name.

        Args:
            grads: The gradient of each operation's output.
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
        norms = self.norms(self.rows(grads), layout, own)
        result = {name: norms[role] for role, name in wanted}
        if scales is None:
            return result
        return {n: v if scales[n].dim() else v * scales[n].square() for n, v in result.items()}

    def rows(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Each g as rows (R, ...)."""
        return [g.flatten(0, n - 1) for g, n in zip(grads, self.flatten, strict=True)]


def find_uses(logits: Tensor, params: Params) -> list[Use]:
    """The operations of a forward pass whose parameters have a rule.

    Of what is used more than once these are linear layers, as over time in a recurrent one, and
    embeddings tied to linear layers.

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
    nodes = list(topological(logits))
    takers = _takers(nodes)
    for node in nodes:
        calls += ((node, call) for call in calls_at(node))
        if hasattr(node, "variable"):
            if id(node.variable) in names:
                leaf_of[node] = names[id(node.variable)]
                seen[node] = _as_it_is
            continue
        inputs = [following for following, _ in node.next_functions]
        if with_weights(node) is not node:
            outer[with_weights(node)] = node
        kind = operation(node)
        is_seen = _is_of_places(node, takers) if kind == "Embedding" else kind in _SEEN
        if inputs and inputs[0] in leaf_of and is_seen:
            leaf_of[node] = leaf_of[inputs[0]]
            seen[node] = _after(seen[inputs[0]], _SEEN[kind](node))
            continue
        for place, following in enumerate(inputs):
            if following in leaf_of:
                consumers[leaf_of[following]].append((node, place))
    found = list(_of_layers(calls, names, consumers))
    done = {name for use in found for name in use.names.values()}
    roles: dict[tuple[Any, ...], dict[str, str]] = {}
    for name, places in consumers.items():
        role = None if not places or name in done else _role(places)
        if role is not None:
            roles.setdefault(tuple(node for node, _ in places), {}).setdefault(role, name)
    for takers_of, own in roles.items():
        node = takers_of[0]
        if len(takers_of) > 1:
            use = _shared(takers_of, own, seen, params)
        elif _is_users(node):
            use = _use_of_function(node, own, seen)
        else:
            use = _use(node, own, seen, outer.get(node, node))
        if use is not None:
            found.append(use)
    return found


def _role(places: Sequence[tuple[Any, int]]) -> str | None:
    """The one role that a parameter has in the operations that take it."""
    if len({node for node, _ in places}) < len(places):
        return None
    roles = {
        str(place) if _is_users(node) else ROLES.get(operation(node), {}).get(place)
        for node, place in places
    }
    return roles.pop() if len(roles) == 1 else None


def _shared(
    nodes: tuple[Any, ...], names: dict[str, str], seen: Mapping[Any, Seen], params: Params
) -> Use | None:
    """A weight, with the bias that always goes with it, in several operations."""
    if not (takes_rows(nodes) and names.keys() <= {"weight", "bias"}):
        return None
    views = []
    for node in nodes:
        for place, role in ROLES[operation(node)].items():
            following = node.next_functions[place][0]
            if role in names and following in seen:
                p = params[names[role]].detach()
                views.append((role, node, seen[following](p), p))
    rule = shared_rule(nodes, views)
    if rule is None:
        return None
    flatten = tuple(_num_leading(node) for node in nodes)
    return Use(
        nodes, tuple(GradientEdge(node, 0) for node in nodes), names,
        tuple(math.prod(output_shape(n)[:lead]) for n, lead in zip(nodes, flatten, strict=True)),
        rule.norms, flatten, dict.fromkeys(names, _as_it_is), shared=rule,
    )  # fmt: skip


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
            edge = GradientEdge(node, call.place)
            yield Use((node,), (edge,), own, (shape[0],), _of_one(norms), (1,), seen, kind)


def _of_one(norms: NormsOf) -> JointNormsOf:
    return lambda rows, layout, scales: norms(rows[0], layout, scales)


def _use_of_function(node: Any, names: dict[str, str], seen: Mapping[Any, Seen]) -> Use | None:
    shape = output_shape(node)
    shapes = {role: _shape_at(node, int(role)) for role in names}
    found = rule_of_function(node, shapes) if shape else None
    if found is None:
        return None
    kind, norms = found
    own = {role: seen[node.next_functions[int(role)][0]] for role in names}
    edge = GradientEdge(node, 0)
    return Use((node,), (edge,), names, (shape[0],), _of_one(norms), (1,), own, kind)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _after(first: Seen, then: Seen) -> Seen:
    return lambda tensor: then(first(tensor))


def _takers(nodes: Sequence[Any]) -> dict[Any, list[Any]]:
    """What takes the output of each operation."""
    takers: dict[Any, list[Any]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            takers.setdefault(following, []).append(node)
    return takers


def _is_of_places(node: Any, takers: Mapping[Any, Sequence[Any]]) -> bool:
    """Whether an embedding's rows, all different ones, are added to every example's alike."""
    own = takers.get(node, ())
    if operation(node) != "Embedding" or len(own) != 1 or operation(own[0]) != "Add":
        return False
    indices, padding = node._saved_indices.flatten(), node._saved_padding_idx
    is_broadcast = math.prod(output_shape(own[0])) > math.prod(output_shape(node))
    if not is_broadcast or node._saved_scale_grad_by_freq or bool((indices == padding).any()):
        return False
    return len(indices.unique()) == len(indices)


def _as_rows(node: Any) -> Seen:
    indices = node._saved_indices
    return lambda tensor: tensor[indices]


def _as_slice(node: Any) -> Seen:
    own = slice(node._saved_start, node._saved_end, node._saved_step)
    index = (*(slice(None) for _ in range(node._saved_dim)), own)
    return lambda tensor: tensor[index]


def _as_view(node: Any) -> Seen:
    shape = output_shape(node)
    return lambda tensor: tensor.reshape(shape)


_SEEN: dict[str, Callable[[Any], Seen]] = {
    "T": lambda _: lambda tensor: tensor.mT,
    "ToCopy": lambda _: _as_it_is,
    "View": _as_view,
    "Unsqueeze": _as_view,
    "ReshapeAlias": _as_view,
    # Of the entries left out the gradient is 0:
    "Slice": _as_slice,
    "Embedding": _as_rows,
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
    if kind in RULES:
        flatten = _num_leading(node)
    num_rows = math.prod(output_shape(node)[:flatten])
    own = {
        role: seen[node.next_functions[place][0]] for place, role in ROLES[kind].items()
        if role in names and node.next_functions[place][0] in seen
    }  # fmt: skip
    edge = GradientEdge(outer, 0)
    return Use((node,), (edge,), names, (num_rows,), _of_one(norms), (flatten,), own)


def _num_leading(node: Any) -> int:
    """How many dimensions of the output of an operation with a rule make up its rows."""
    if operation(node) == "NativeLayerNorm":
        return len(output_shape(node)) - len(node._saved_normalized_shape)
    return len(output_shape(node)) - 1 if operation(node) == "Embedding" else 1


def _shape_at(node: Any, place: int) -> list[int]:
    """The shape of a parameter as an operation sees it."""
    operand = node.next_functions[place][0]
    own = getattr(operand, "variable", None)
    return output_shape(operand) if own is None else list(own.shape)
