"""Squared norms of every example's gradient, without ever holding those gradients.

For outputs f_i of example i and a cotangent u_i, each parameter tensor t gets ||J_it^T u_i||^2 for
all examples of a batch from one backward pass down to the operations' outputs; no gradient of a
parameter is formed, and the rules of `norm_rules` do the rest. Parameters that are used twice, or
in an operation without a rule, are left to `differentiated_norms`, which differentiates example
by example.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge
from torch.func import vjp, vmap

from hesstrace_cli.autodiff.graph import Params, topological
from hesstrace_cli.curvature.per_example import norm_rules
from hesstrace_cli.curvature.per_example.independence import column
from hesstrace_cli.curvature.per_example.linearity import operation
from hesstrace_cli.curvature.per_example.norm_rules import (
    ROLES,
    RULES,
    Layout,
    Norms,
    NormsOf,
    broadcast,
    lead,
    output_shape,
)
from hesstrace_cli.failures import is_of_the_machine

Seen = Callable[[Tensor], Tensor]
"""What is done with a parameter, of which no number changes, before an operation takes it."""


@dataclass
class Use:
    """An operation with parameters among its operands that are used nowhere else.

    Attributes:
        edge: Where its output's gradient g is read off.
        names: The names, by role, of those parameters.
        num_rows: R.
        norms: From the rows (R, ...) of g, their layout and what scales the entries of a gradient
            to squared norms (N,), by role.
        flatten: How many of g's leading dimensions make up the rows.
        seen: By role how the operation sees a parameter, as its transpose or in another shape.
    """

    edge: GradientEdge
    names: dict[str, str]
    num_rows: int
    norms: NormsOf
    flatten: int = 1
    seen: Mapping[str, Seen] = field(default_factory=dict)

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
    for node in topological(logits):
        if hasattr(node, "variable"):
            if id(node.variable) in names:
                leaf_of[node] = names[id(node.variable)]
                seen[node] = _as_it_is
            continue
        inputs = [following for following, _ in node.next_functions]
        if inputs and inputs[0] in leaf_of and operation(node) in _SEEN:
            leaf_of[node] = leaf_of[inputs[0]]
            seen[node] = _after(seen[inputs[0]], _SEEN[operation(node)](node))
            continue
        for place, following in enumerate(inputs):
            if following in leaf_of:
                consumers[leaf_of[following]].append((node, place))
    roles: dict[Any, dict[str, str]] = {}
    for name, places in consumers.items():
        if len(places) == 1:
            node, place = places[0]
            role = ROLES.get(operation(node), {}).get(place)
            if role is not None:
                roles.setdefault(node, {}).setdefault(role, name)
    uses = (_use(node, own, seen) for node, own in roles.items())
    return [use for use in uses if use is not None]


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


def _use(node: Any, names: dict[str, str], seen: Mapping[Any, Seen]) -> Use | None:
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
    return Use(GradientEdge(node, 0), names, num_rows, norms, flatten, own)


def _shape_at(node: Any, place: int) -> list[int]:
    """The shape of a parameter as an operation sees it."""
    operand = node.next_functions[place][0]
    own = getattr(operand, "variable", None)
    return output_shape(operand) if own is None else list(own.shape)


_POWERS = 16


def check_layouts(logits: Tensor, uses: Sequence[Use]) -> dict[str, Layout]:
    """Find out which rows of every operation belong to which example, by two backward passes.

    In the second, every example's cotangent is multiplied by a power of 2, its own one where
    examples are few: so are, to the bit, the gradients of all rows that are its alone.

    Args:
        logits: The outputs, shape (N, ...), with their graph.
        uses: Of `find_uses`.

    Returns:
        The layout for each parameter name; those for which none is right are left out.
    """
    if not uses:
        return {}
    N, device = len(logits), logits.device
    generator = Generator(device).manual_seed(0)
    scale = torch.exp2(torch.randperm(N, generator=generator, device=device) % _POWERS)
    u = torch.randn(logits.shape, generator=generator, device=device).to(logits.dtype)
    scale = scale.to(u)
    layouts: dict[str, Layout] = {}
    for use, plain, scaled in zip(
        uses, gradients(logits, uses, u), gradients(logits, uses, u * column(scale, u)), strict=True
    ):
        for layout in (Layout(N), Layout(N, strided=True)):
            if use.num_rows % N == 0 and _belong(use, plain, scaled, layout, scale):
                layouts |= dict.fromkeys(use.names.values(), layout)
                break
    return layouts


def _belong(use: Use, plain: Tensor, scaled: Tensor, layout: Layout, scale: Tensor) -> bool:
    """Whether every row of gradients is scaled by the factor of the example it should be of."""

    def of_examples(g: Tensor) -> Tensor:
        return layout.group(use.rows(g).reshape(use.num_rows, -1))  # (N, L, numbers in a row)

    expected, got = scale[:, None, None] * of_examples(plain), of_examples(scaled)
    return bool(((got - expected).norm(dim=2) <= 1e-3 * got.norm(dim=2)).all())


def gradients(logits: Tensor, uses: Sequence[Use], cotangent: Tensor) -> list[Tensor]:
    """The gradients of the outputs of operations; the graph is kept."""
    edges = [use.edge for use in uses]
    if not edges:
        return []
    return list(torch.autograd.grad(
        logits, edges, cotangent, retain_graph=True, materialize_grads=True
    ))  # fmt: skip


def rule_norms(uses: Sequence[Use], grads: Sequence[Tensor], layouts: dict[str, Layout]) -> Norms:
    """||J_it^T u_i||^2 for every example i and every parameter tensor t that has a rule.

    Args:
        uses: Of `find_uses`.
        grads: Of `gradients`, for the cotangent u.
        layouts: Of `check_layouts`, for all of their parameters.

    Returns:
        Shape (N,) by name.
    """
    result: Norms = {}
    for use, g in zip(uses, grads, strict=True):
        with torch.set_grad_enabled(g.requires_grad):
            result |= use.squares(g, layouts[next(iter(use.names.values()))])
    return result


def differentiated_norms(
    outputs_of: Callable[[Params, Tensor], Tensor], params: Params, X: Tensor, cotangents: Tensor
) -> Norms:
    """The same norms by differentiating example by example, for parameters without a rule.

    Args:
        outputs_of: The outputs as a function of parameters and inputs.
        params: The P' numbers of the parameters in question, by name.
        X: The inputs, shape (N, ...).
        cotangents: u, K for the outputs of every example, shape (K, N, ...).

    Returns:
        Shape (K, N) by name.
    """

    def one(x: Tensor, own: Tensor) -> Norms:
        pull = vjp(lambda p: outputs_of(p, x[None])[0], dict(params))[1]
        rows = [pull(u)[0] for u in own]
        return {name: torch.stack([row[name].square().sum() for row in rows]) for name in params}

    numbers = len(cotangents) * sum(p.numel() for p in params.values())
    size = max(1, norm_rules.CHUNK // numbers)
    try:
        with warnings.catch_warnings():  # slow where torch has no batching rule, but right
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            mapped = vmap(one, in_dims=(0, 1), out_dims=1, chunk_size=size)(X, cotangents)
    except (RuntimeError, NotImplementedError) as problem:
        if is_of_the_machine(problem):
            raise
        # An operation that vmap cannot batch.
        return _one_by_one(outputs_of, params, X, cotangents)
    # Or batches wrongly, which it did for prelu: two examples by themselves tell, if they count.
    counting = cotangents.flatten(2).any(2).any(0).nonzero().flatten().tolist() or [0]
    ends = [counting[0], counting[-1]]
    alone = _one_by_one(outputs_of, params, X[ends], cotangents[:, ends])
    if all(torch.allclose(mapped[name][:, ends], alone[name], rtol=1e-3) for name in params):
        return mapped
    return _one_by_one(outputs_of, params, X, cotangents)


def _one_by_one(
    outputs_of: Callable[[Params, Tensor], Tensor], params: Params, X: Tensor, cotangents: Tensor
) -> Norms:
    result = {name: p.new_zeros(cotangents.shape[:2]) for name, p in params.items()}
    for i in range(len(X)):
        outputs = outputs_of(params, X[i : i + 1])
        for k, u in enumerate(cotangents[:, i]):
            grads = torch.autograd.grad(
                outputs, list(params.values()), u[None], retain_graph=True, materialize_grads=True
            )
            for name, g in zip(params, grads, strict=True):
                result[name][k, i] = g.square().sum()
    return result
