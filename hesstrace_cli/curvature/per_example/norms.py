"""Squared norms of every example's gradient, without ever holding those gradients.

For outputs f_i of example i and a cotangent u_i, each parameter tensor t gets ||J_it^T u_i||^2 for
all examples of a batch from one backward pass down to the operations' outputs; no gradient of a
parameter is formed, and the rules do the rest. Parameters that are used twice, or
in an operation without a rule, are left to `differentiated_norms`, which differentiates example
by example.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.func import vjp, vmap

from hesstrace_cli.autodiff.graph import Params, named
from hesstrace_cli.curvature.per_example.independence import column
from hesstrace_cli.curvature.per_example.rules.chunks import at_once
from hesstrace_cli.curvature.per_example.rules.layout import Layout, Norms
from hesstrace_cli.curvature.per_example.uses import Use
from hesstrace_cli.failures import is_of_the_machine

_POWERS = 16


def check_layouts(
    outputs: Tensor, uses: Sequence[Use], examples: Tensor | None = None
) -> dict[str, Layout]:
    """Find out which rows of every operation belong to which example, by two backward passes.

    In the second, every example's cotangent is multiplied by a power of 2, its own one where
    examples are few: so are, to the bit, the gradients of all rows that are its alone.

    Args:
        outputs: Shape (N, ...), or what they are made of, with their graph.
        uses: Of `find_uses`.
        examples: Of each row the example, from 0; they are the rows where it is None.

    Returns:
        The layout for each parameter name; those for which none is right are left out.
    """
    if not uses:
        return {}
    device = outputs.device
    N = len(outputs) if examples is None else int(examples.max()) + 1
    generator = Generator(device).manual_seed(0)
    scale = torch.exp2(torch.randperm(N, generator=generator, device=device) % _POWERS)
    u = torch.randn(outputs.shape, generator=generator, device=device).to(outputs.dtype)
    scale = scale.to(u)
    of_rows = column(scale if examples is None else scale[examples], u)
    layouts: dict[str, Layout] = {}
    for use, plain, scaled in zip(
        uses, gradients(outputs, uses, u), gradients(outputs, uses, u * of_rows), strict=True
    ):
        for layout in (Layout(N), Layout(N, strided=True)):
            fits = all(rows % N == 0 for rows in use.rows_at)
            if fits and _belong(use, plain, scaled, layout, scale):
                layouts |= dict.fromkeys(use.names.values(), layout)
                break
    return layouts


def _belong(
    use: Use, plain: Sequence[Tensor], scaled: Sequence[Tensor], layout: Layout, scale: Tensor
) -> bool:
    """Whether every row of gradients is scaled by the factor of the example it should be of."""

    def of_examples(grads: Sequence[Tensor]) -> list[Tensor]:  # (N, L, numbers in a row)
        rows = zip(use.rows(grads), use.rows_at, strict=True)
        return [layout.group(g.reshape(num, -1)) for g, num in rows]

    return all(
        bool(((got - scale[:, None, None] * g).norm(dim=2) <= 1e-3 * got.norm(dim=2)).all())
        for g, got in zip(of_examples(plain), of_examples(scaled), strict=True)
    )


def gradients(
    outputs: Tensor, uses: Sequence[Use], cotangent: Tensor, *, create_graph: bool = False
) -> list[list[Tensor]]:
    """The gradients of the outputs of each use's operations; the graph is kept."""
    edges = [edge for use in uses for edge in use.edges]
    if not edges:
        return []
    grads = iter(torch.autograd.grad(
        outputs, edges, cotangent, retain_graph=True, create_graph=create_graph,
        materialize_grads=True,
    ))  # fmt: skip
    return [list(itertools.islice(grads, len(use.edges))) for use in uses]


def rule_norms(
    uses: Sequence[Use], grads: Sequence[Sequence[Tensor]], layouts: dict[str, Layout]
) -> Norms:
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
        with torch.set_grad_enabled(g[0].requires_grad):
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

    def one(row: Tensor, own: Tensor) -> Norms:
        # By its row, as X may be several arguments of the model.
        pull = vjp(lambda p: outputs_of(p, X[row[None]])[0], dict(params))[1]
        rows = [pull(u)[0] for u in own]
        return {name: torch.stack([row[name].square().sum() for row in rows]) for name in params}

    numbers = len(cotangents) * sum(p.numel() for p in params.values())
    size = at_once(numbers)
    try:
        with warnings.catch_warnings():  # slow where torch has no batching rule, but right
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            mapped = vmap(one, in_dims=(0, 1), out_dims=1, chunk_size=size)(
                torch.arange(len(X), device=X.device), cotangents
            )
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
            for name, g in named(params, grads).items():
                result[name][k, i] = g.square().sum()
    return result
