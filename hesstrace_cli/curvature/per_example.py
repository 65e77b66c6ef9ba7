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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge
from torch.func import vjp, vmap

from hesstrace_cli.curvature import norm_rules
from hesstrace_cli.curvature.graph import topological
from hesstrace_cli.curvature.linearity import operation
from hesstrace_cli.curvature.norm_rules import (
    ROLES,
    RULES,
    Layout,
    Norms,
    NormsOf,
    broadcast,
    lead,
    output_shape,
)
from hesstrace_cli.curvature.probes import Params
from hesstrace_cli.failures import is_of_the_machine


@dataclass
class Use:
    """An operation with parameters among its operands that are used nowhere else.

    Attributes:
        edge: Where its output's gradient g is read off.
        names: The names, by role, of those parameters whose norms are wanted.
        num_rows: R.
        norms: From the rows (R, ...) of g and their layout to squared norms (N,), by role.
        flatten: How many of g's leading dimensions make up the rows.
    """

    edge: GradientEdge
    names: dict[str, str]
    num_rows: int
    norms: NormsOf
    flatten: int = 1

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
    leaf_of: dict[Any, str] = {}  # a parameter's node, or that of its transpose
    consumers: dict[str, list[tuple[Any, int]]] = {name: [] for name in params}
    for node in topological(logits):
        if hasattr(node, "variable"):
            if id(node.variable) in names:
                leaf_of[node] = names[id(node.variable)]
            continue
        inputs = [following for following, _ in node.next_functions]
        if operation(node) == "T" and inputs[0] in leaf_of:
            leaf_of[node] = leaf_of[inputs[0]]
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
    uses = (_use(node, own, params) for node, own in roles.items())
    return [use for use in uses if use is not None]


def _use(node: Any, names: dict[str, str], params: Params) -> Use | None:
    kind, flatten = operation(node), 1
    if node._input_metadata[0].dtype.is_complex:
        return None
    if kind in RULES:
        if "other" in names:  # a parameter where the activations should be
            return None
        norms = RULES[kind](node)
    else:
        leaf = params[names["weight"]]
        place = next(i for i, (n, _) in enumerate(node.next_functions)
                     if n is not None and getattr(n, "variable", None) is leaf)  # fmt: skip
        flatten = lead(node, leaf)
        norms = broadcast(node, place, leaf) if flatten else None
    if norms is None:
        return None
    shape = output_shape(node)
    if kind in ("NativeLayerNorm", "Embedding"):
        flatten = len(shape) - (1 if kind == "Embedding" else len(node._saved_normalized_shape))
    num_rows = math.prod(shape[:flatten])
    return Use(GradientEdge(node, 0), names, num_rows, norms, flatten)


def check_independence(
    logits_of: Callable[[Tensor], Tensor], X: Tensor, generator: Generator
) -> None:
    """Refuse a model that lets examples of a batch touch each other.

    Inputs without a gradient are told by the logits of an example with and without the others.

    Raises:
        MixedExamples: If the logits of an example depend on the others in its batch.
    """
    if len(X) < 2:
        return
    mixed: bool
    if X.is_floating_point():
        inputs = X.detach().requires_grad_()
        chosen = torch.arange(len(X), device=X.device) % 2 == 0
        logits = logits_of(inputs)
        weights = torch.randn(logits.shape, generator=generator, device=X.device).to(logits.dtype)
        if logits.requires_grad:
            (slope,) = torch.autograd.grad(
                logits, inputs, weights * _column(chosen, logits), materialize_grads=True
            )
            mixed = bool(slope[~chosen].any())
        else:
            mixed = False
    else:
        with torch.no_grad():
            mixed = not torch.allclose(logits_of(X)[:1], logits_of(X[:1]), rtol=1e-3, atol=1e-5)
    if mixed:
        raise MixedExamples("the logits of an example depend on the others in its batch")


def _column(chosen: Tensor, like: Tensor) -> Tensor:
    """One entry an example, in a shape that multiplies the outputs."""
    return chosen.reshape(-1, *[1] * (like.dim() - 1))


class MixedExamples(Exception):
    """Examples are not independent of each other, so that none has a gradient of its own."""


_ROUNDS = 6


def check_layouts(logits: Tensor, uses: Sequence[Use]) -> dict[str, Layout]:
    """Find out which rows of every operation belong to which example, by backward passes.

    About half of the examples get no cotangent; every row with a gradient must belong to one of
    the others. Where both layouts agree with that, another half is tried, a few times.

    Args:
        logits: Shape (N, C), with its graph.
        uses: Of `find_uses`.

    Returns:
        The layout for each parameter name; those for which it cannot be told are left out.

    Raises:
        MixedExamples: If an example's logits depend on other examples, as with batch statistics.
    """
    N = len(logits)
    generator = Generator(logits.device).manual_seed(0)
    uses = [use for use in uses if use.num_rows % N == 0]
    possible = [{Layout(N), Layout(N, strided=True)} for _ in uses]
    for number in range(_ROUNDS):
        chosen = torch.rand(N, generator=generator, device=logits.device) < 0.5
        chosen[0], chosen[-1] = (False, True) if number % 2 == 0 else (True, False)
        cotangent = torch.randn(logits.shape, generator=generator, device=logits.device)
        cotangent = (cotangent * _column(chosen | (N == 1), logits)).to(logits.dtype)
        for use, layouts, g in zip(
            uses, possible, _gradients(logits, uses, cotangent), strict=True
        ):
            touched = use.rows(g).reshape(use.num_rows, -1).any(1)
            wrong = {each for each in layouts if each.group(touched)[~chosen].any() and N > 1}
            layouts -= wrong
            if not layouts:
                raise MixedExamples("the logits of an example depend on the others in its batch")
        if all(len(layouts) == 1 or use.num_rows == N or N == 1
               for use, layouts in zip(uses, possible, strict=True)):  # fmt: skip
            break
    return {
        name: min(layouts, key=lambda each: each.strided)
        for use, layouts in zip(uses, possible, strict=True)
        if len(layouts) == 1 or use.num_rows == N or N == 1
        for name in use.names.values()
    }


def _gradients(logits: Tensor, uses: Sequence[Use], cotangent: Tensor) -> list[Tensor]:
    edges = [use.edge for use in uses]
    if not edges:
        return []
    return list(torch.autograd.grad(logits, edges, cotangent, retain_graph=True))


def rule_norms(
    logits: Tensor, uses: Sequence[Use], cotangent: Tensor, layouts: dict[str, Layout]
) -> Norms:
    """||J_it^T u_i||^2 for every example i and every parameter tensor t that has a rule.

    Args:
        logits: Shape (N, C), with its graph, which is kept.
        uses: Of `find_uses` for this graph.
        cotangent: u, shape (N, C).
        layouts: Of `check_layouts`; parameters without a layout are left out.

    Returns:
        Shape (N,) by name.
    """
    N = len(logits)
    uses = [use for use in uses if all(name in layouts for name in use.names.values())]
    result: Norms = {}
    for use, g in zip(uses, _gradients(logits, uses, cotangent), strict=True):
        name = next(iter(use.names.values()))
        norms = use.norms(use.rows(g), Layout(N, layouts[name].strided))
        result |= {own: norms[role] for role, own in use.names.items()}
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
    # Or batches wrongly, which it did for prelu: two examples by themselves tell.
    ends = [0, len(X) - 1]
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
