"""Squared norms of every example's gradient, without ever holding those gradients.

For logits f_i of example i and a cotangent u_i, each parameter tensor t gets ||J_it^T u_i||^2 for
all examples of a batch from one backward pass down to the operations' outputs; no gradient of a
parameter is formed. What is left then is the norm of a sum over positions l of outer products,

    || sum_l g_l x_l^T ||^2   =   sum_{l,l'} (g_l . g_l') (x_l . x_l')

for linear layers, convolutions (x_l the l-th patch) and embeddings, and of sums for norms and
biases. Parameters that are used twice, or in an operation without such a rule, are left to
`differentiated_norms`, which differentiates example by example.

Source:
    Goodfellow, "Efficient per-example gradient computations", arXiv 1510.01799, for linear layers;
    Rochette et al., arXiv 1912.06015, for convolutions; the Gram form is Li et al.,
    "Large language models can be strong differentially private learners", arXiv 2110.05679.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd.graph import GradientEdge
from torch.func import vjp, vmap

from hesstrace_cli.curvature.graph import topological
from hesstrace_cli.curvature.linearity import operation
from hesstrace_cli.curvature.probes import Params

CHUNK = 1 << 24
"""Numbers in the largest temporary tensor of a rule (64 MiB in float32)."""

Norms = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """How the R = N L rows of an operation belong to the N examples.

    Attributes:
        num_examples: N.
        strided: Whether example i has the rows i, i + N, ... (sequence first) and not
            i L, ..., i L + L - 1 (batch first).
    """

    num_examples: int
    strided: bool = False

    def group(self, rows: Tensor) -> Tensor:
        """From (R, ...) to (N, L, ...)."""
        if self.strided:
            return rows.unflatten(0, (-1, self.num_examples)).transpose(0, 1)
        return rows.unflatten(0, (self.num_examples, -1))


NormsOf = Callable[[Tensor, Layout], Norms]


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


class Outer:
    """||sum_l g_l x_l^T||^2 for one set of x and one g after another.

    Args:
        X: Shape (N, L, d).
    """

    def __init__(self, X: Tensor) -> None:
        self.X = X
        self._gram: Tensor | None = None

    def norms(self, G: Tensor) -> Tensor:
        """The squared norms (N,) for G of shape (N, L, k), by the cheaper of the two forms."""
        N, L, k = G.shape
        d = self.X.shape[2]
        if L == 1:
            return G.square().sum((1, 2)) * self.X.square().sum((1, 2))
        if L * k + L * L > k * d:
            return _in_chunks(lambda g, x: (g.mT @ x).square().sum((1, 2)), k * d, G, self.X)
        if N * L * L > CHUNK:
            return _in_chunks(lambda g, x: ((g @ g.mT) * (x @ x.mT)).sum((1, 2)), L * L, G, self.X)
        if self._gram is None:
            self._gram = self.X @ self.X.mT
        return ((G @ G.mT) * self._gram).sum((1, 2))


def _in_chunks(function: Callable[..., Tensor], numbers: int, *tensors: Tensor) -> Tensor:
    """Apply it to chunks of examples; each example's temporary has so many numbers."""
    size = max(1, CHUNK // numbers)
    chunks = zip(*(t.split(size) for t in tensors), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks])


# One function an operation, from its node of the graph to the squared norms by role.


def _linear(node: Any) -> NormsOf | None:
    addmm = operation(node) == "Addmm"
    if addmm and (node._saved_alpha != 1 or node._saved_beta != 1):
        return None
    X = node._saved_mat1 if addmm else node._saved_self
    outer: dict[Layout, Outer] = {}

    def norms(g: Tensor, layout: Layout) -> Norms:
        G = layout.group(g)
        result = {"bias": G.sum(1).square().sum(1)}
        if X is not None:  # it is saved only where the weight needs a gradient
            if layout not in outer:
                outer[layout] = Outer(layout.group(X))
            result["weight"] = outer[layout].norms(G)
        return result

    return norms


def _convolution(node: Any) -> NormsOf | None:
    X, W, groups = node._saved_input, node._saved_weight, node._saved_groups
    if W.dim() not in (3, 4):
        return None

    def two(values: Sequence[int], default: int) -> tuple[int, int]:
        return (default, int(values[0])) if len(values) == 1 else (int(values[0]), int(values[1]))

    window: dict[str, Any] = {
        "kernel_size": two(W.shape[2:], 1),
        "dilation": two(node._saved_dilation, 1),
        "padding": two(node._saved_padding, 0),
        "stride": two(node._saved_stride, 1),
    }

    def vectors(images: Tensor, layout: Layout, *, patches: bool) -> Tensor:
        """From (R, C, H, W) to (N * groups, positions of all rows, channels or patch)."""
        if patches:
            columns = F.unfold(images.unsqueeze(2) if W.dim() == 3 else images, **window)
        else:
            columns = images.flatten(2)
        grouped = layout.group(columns.unflatten(1, (groups, -1)))  # (N, L, groups, d, positions)
        return grouped.permute(0, 2, 1, 4, 3).flatten(2, 3).flatten(0, 1)

    transposed = node._saved_transposed
    remembered: dict[Layout, Outer] = {}

    def weight(g: Tensor, x: Tensor, layout: Layout, whole: bool) -> Tensor:
        outer = remembered.get(layout) if whole else None
        if outer is None:
            outer = Outer(vectors(g if transposed else x, layout, patches=True))
            if whole and not transposed:
                remembered[layout] = outer
        other = vectors(x if transposed else g, layout, patches=False)
        return outer.norms(other).unflatten(0, (-1, groups)).sum(1)

    def norms(g: Tensor, layout: Layout) -> Norms:
        result = {"bias": layout.group(g).flatten(3).sum((1, 3)).square().sum(1)}
        if X is None:
            return result
        N = layout.num_examples
        image = g if transposed else X
        positions = (X if transposed else g)[0, 0].numel()
        per_example = len(g) // N * positions * image.shape[1] * W[0, 0].numel()
        size = max(1, CHUNK // per_example)
        indices = layout.group(torch.arange(len(g), device=g.device))
        result["weight"] = weight(g, X, layout, True) if size >= N else torch.cat([
            weight(g[at.flatten()], X[at.flatten()], Layout(len(at)), False)
            for at in indices.split(size)
        ])  # fmt: skip
        return result

    return norms


def _embedding(node: Any) -> NormsOf | None:
    if node._saved_scale_grad_by_freq:
        return None
    indices, padding = node._saved_indices.flatten(), node._saved_padding_idx

    def norms(g: Tensor, layout: Layout) -> Norms:
        def of(G: Tensor, at: Tensor) -> Tensor:
            return ((G @ G.mT) * (at[:, :, None] == at[:, None, :])).sum((1, 2))

        at = layout.group(indices)
        G = layout.group(g) * (at != padding)[..., None]
        return {"weight": _in_chunks(of, at.shape[1] ** 2, G, at)}

    return norms


def _affine(normalized: Tensor) -> NormsOf:
    """A scale and a shift of what a norm gives, in the shape (R, channels, positions)."""

    def norms(g: Tensor, layout: Layout) -> Norms:
        def norm(products: Tensor) -> Tensor:
            return layout.group(products).sum((1, 3)).square().sum(1)

        g = g.reshape(normalized.shape)
        return {"weight": norm(g * normalized), "bias": norm(g)}

    return norms


def _batch_norm(node: Any) -> NormsOf | None:
    if node._saved_training:
        return None
    X = node._saved_input
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
    mean, scale = node._saved_running_mean, torch.rsqrt(node._saved_running_var + eps)
    return _affine((X.reshape(*X.shape[:2], -1) - mean[:, None]) * scale[:, None])


def _layer_norm(node: Any) -> NormsOf | None:
    X = (node._saved_input - node._saved_result1) * node._saved_result2
    lead = X.dim() - len(node._saved_normalized_shape)
    return _affine(X.flatten(0, lead - 1).flatten(1)[..., None]) if lead else None


def _group_norm(node: Any) -> NormsOf | None:
    X, mean, rstd = node._saved_input, node._saved_result1, node._saved_result2
    grouped = X.reshape(len(X), node._saved_group, -1)
    normalized = (grouped - mean[..., None]) * rstd[..., None]
    return _affine(normalized.reshape(*X.shape[:2], -1))


def _broadcast(node: Any, place: int, leaf: Tensor) -> NormsOf | None:
    """A parameter that is added to, or multiplied with, something larger."""
    if operation(node) == "Mul":
        factor = node._saved_other if place == 0 else node._saved_self
    elif node._saved_alpha == 1 or place == 0:
        factor = None
    else:
        return None
    size = output_shape(node)
    shape = [1] * (len(size) - leaf.dim()) + list(leaf.shape)
    summed = [d for d in range(_lead(node, leaf), len(size)) if shape[d] == 1]

    def norms(rows: Tensor, layout: Layout) -> Norms:
        g = rows.view(size)
        g = g if factor is None else g * factor
        g = g.sum(summed, keepdim=True) if summed else g
        per_row = g.reshape(len(rows), -1)
        return {"weight": layout.group(per_row).sum(1).square().sum(1)}

    return norms


def _lead(node: Any, leaf: Tensor) -> int:
    """How many leading dimensions of the output a broadcast parameter lacks."""
    size = output_shape(node)
    shape = [1] * (len(size) - leaf.dim()) + list(leaf.shape)
    return next((d for d, length in enumerate(shape) if length != 1), len(size))


def output_shape(node: Any) -> list[int]:
    """The shape of what an operation gave."""
    return list(node._input_metadata[0].shape)


_ROLES: dict[str, dict[int, str]] = {
    "Addmm": {0: "bias", 1: "other", 2: "weight"},
    "Mm": {0: "other", 1: "weight"},
    "Convolution": {1: "weight", 2: "bias"},
    "NativeBatchNorm": {1: "weight", 2: "bias"},
    "CudnnBatchNorm": {1: "weight", 2: "bias"},
    "NativeLayerNorm": {1: "weight", 2: "bias"},
    "NativeGroupNorm": {1: "weight", 2: "bias"},
    "Embedding": {0: "weight"},
    "Mul": {0: "weight", 1: "weight"},
    "Add": {0: "weight", 1: "weight"},
}
_RULES: dict[str, Callable[[Any], NormsOf | None]] = {
    "Addmm": _linear,
    "Mm": _linear,
    "Convolution": _convolution,
    "NativeBatchNorm": _batch_norm,
    "CudnnBatchNorm": _batch_norm,
    "NativeLayerNorm": _layer_norm,
    "NativeGroupNorm": _group_norm,
    "Embedding": _embedding,
}


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
            role = _ROLES.get(operation(node), {}).get(place)
            if role is not None:
                roles.setdefault(node, {}).setdefault(role, name)
    uses = (_use(node, own, params) for node, own in roles.items())
    return [use for use in uses if use is not None]


def _use(node: Any, names: dict[str, str], params: Params) -> Use | None:
    kind, flatten = operation(node), 1
    if kind in _RULES:
        if "other" in names:  # a parameter where the activations should be
            return None
        norms = _RULES[kind](node)
    else:
        leaf = params[names["weight"]]
        place = next(i for i, (n, _) in enumerate(node.next_functions)
                     if n is not None and getattr(n, "variable", None) is leaf)  # fmt: skip
        flatten = _lead(node, leaf)
        norms = _broadcast(node, place, leaf) if flatten else None
    if norms is None:
        return None
    shape = output_shape(node)
    if kind in ("NativeLayerNorm", "Embedding"):
        flatten = len(shape) - (1 if kind == "Embedding" else len(node._saved_normalized_shape))
    num_rows = math.prod(shape[:flatten])
    return Use(GradientEdge(node, 0), names, num_rows, norms, flatten)


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
        cotangent = (cotangent * (chosen | (N == 1))[:, None]).to(logits.dtype)
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


class MixedExamples(Exception):
    """Examples are not independent of each other, so that none has a gradient of its own."""


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
    logits_of: Callable[[Params, Tensor], Tensor],
    params: Params,
    X: Tensor,
    cotangents_of: Callable[[Tensor, Tensor], Tensor],
    e: Tensor,
) -> Norms:
    """The same norms by differentiating example by example, for parameters without a rule.

    Args:
        logits_of: The logits (n, C) as a function of parameters and inputs.
        params: The P' numbers of the parameters in question, by name.
        X: The inputs, shape (N, ...).
        cotangents_of: u, from logits and e, both (..., C).
        e: What the cotangents are made of, shape (K, N, C).

    Returns:
        Shape (K, N) by name.
    """

    def one(x: Tensor, directions: Tensor) -> Norms:
        logits, pull = vjp(lambda p: logits_of(p, x[None])[0], dict(params))  # type: ignore[misc]
        grads = vmap(lambda u: pull(u)[0])(cotangents_of(logits, directions))
        return {name: g.flatten(1).square().sum(1) for name, g in grads.items()}

    numbers = len(e) * sum(p.numel() for p in params.values())
    try:
        mapped = vmap(one, in_dims=(0, 1), out_dims=1, chunk_size=max(1, CHUNK // numbers))
        return mapped(X, e)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # an operation that vmap cannot batch
        return _one_by_one(logits_of, params, X, cotangents_of, e)


def _one_by_one(
    logits_of: Callable[[Params, Tensor], Tensor],
    params: Params,
    X: Tensor,
    cotangents_of: Callable[[Tensor, Tensor], Tensor],
    e: Tensor,
) -> Norms:
    result = {name: X.new_zeros(e.shape[:2]) for name in params}
    for i in range(len(X)):
        logits = logits_of(params, X[i : i + 1])
        for k, u in enumerate(cotangents_of(logits, e[:, i]).detach()):
            grads = torch.autograd.grad(
                logits, list(params.values()), u[None], retain_graph=True, materialize_grads=True
            )
            for name, g in zip(params, grads, strict=True):
                result[name][k, i] = g.square().sum()
    return result
