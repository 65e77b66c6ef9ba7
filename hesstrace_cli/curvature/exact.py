"""tr(G) without probes in weight space, and small Hessians' whole diagonals.

    tr(G) = (1/M) sum_i sum_k || J_i^T u_ik ||^2,   sum_k u_ik u_ik^T = A_i

The task's K columns u_k, a backward pass each, give it exactly; one with u_i = B_i e_i for random
signs e, E[e e^T] = I, gives it without bias and with little variance over many examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from hesstrace_cli.curvature.graph import gradient
from hesstrace_cli.curvature.hessian import hvp
from hesstrace_cli.curvature.norm_rules import output_shape
from hesstrace_cli.curvature.objective import Objective, call_as_it_is
from hesstrace_cli.curvature.per_example import (
    check_independence,
    check_layouts,
    differentiated_norms,
    find_uses,
    rule_norms,
)
from hesstrace_cli.curvature.probes import rademacher

ACTIVATIONS = 1 << 27
"""Numbers in the outputs of all operations together, of the examples that are worked on at once."""


class PerExampleTrace:
    """The blocks' traces of every example's G_i = J_i^T A_i J_i, in the model's own mode.

    Args:
        objective: The mean loss that G is of.
        X: A batch, to learn how operations arrange the examples; any other may follow.

    Raises:
        MixedExamples: If the outputs of an example depend on the others in its batch.
    """

    def __init__(self, objective: Objective, X: Tensor) -> None:
        self.objective = objective
        check_independence(self._outputs, X, Generator(X.device).manual_seed(0))
        found = self._outputs(X)
        uses = find_uses(found, objective.params)
        self._layouts = check_layouts(found, uses)
        outputs = sum(math.prod(output_shape(use.edge.node)) for use in uses)
        self._at_once = max(1, ACTIVATIONS * len(X) // max(1, outputs))

    def _outputs(self, X: Tensor) -> Tensor:
        # The model's own operations: their first derivatives, all that is needed, are right.
        return call_as_it_is(self.objective.model, X)

    def without_rule(self) -> list[str]:
        """The parameters that have to be differentiated example by example."""
        return [name for name in self.objective.params if name not in self._layouts]

    def exact(self, X: Tensor, y: Tensor) -> Tensor:
        """M times each example's part of the blocks' traces, (N, T), a backward pass a column."""
        return torch.cat([self._exact(*part) for part in self._parts(X, y)])

    def _parts(self, X: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X.split(self._at_once), y.split(self._at_once), strict=True)

    def _exact(self, X: Tensor, y: Tensor) -> Tensor:
        outputs = self._outputs(X)
        cotangents = self.objective.task.columns(outputs.detach(), y)
        if not len(cotangents):  # a softmax of one class is constant
            return outputs.new_zeros(len(X), len(self.objective.params), dtype=torch.float64)
        return self._blocks(X, outputs, cotangents).sum(0)

    def sample(self, X: Tensor, y: Tensor, num_samples: int, generator: Generator) -> Tensor:
        """Unbiased samples of them, shape (num_samples, N, T), a backward pass each."""
        parts = []
        for X_part, y_part in self._parts(X, y):
            outputs = self._outputs(X_part)
            at = outputs.detach()
            signs = rademacher(at.expand(num_samples, *at.shape), generator=generator)
            cotangents = [self.objective.task.root(at, y_part, e) for e in signs]
            parts.append(self._blocks(X_part, outputs, torch.stack(cotangents)))
        return torch.cat(parts, 1)

    def _blocks(self, X: Tensor, outputs: Tensor, cotangents: Tensor) -> Tensor:
        objective = self.objective
        uses = find_uses(outputs, objective.params)
        rows = [rule_norms(outputs, uses, u, self._layouts) for u in cotangents]
        norms = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        rest = {name: p for name, p in objective.params.items() if name not in norms}
        if rest:
            norms |= differentiated_norms(objective.outputs, rest, X, cotangents)
        return torch.stack([norms[name].detach() for name in objective.params], -1).double()


def hessian_diagonal_traces(objective: Objective, X: Tensor, y: Tensor) -> Tensor:
    """Tr of every diagonal block of the batch's H, shape (T,), from one product H e_j a weight."""
    params = objective.params
    grad = gradient(objective.loss(params, X, y), params, create_graph=True)
    traces = []
    for name, p in params.items():
        total = torch.zeros((), dtype=torch.float64, device=p.device)
        for index in range(p.numel()):
            column = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
            column[index] = 1
            product = hvp(grad, params, {name: column.view(p.shape)})[name]
            total += product.detach().flatten()[index]
        traces.append(total)
    return torch.stack(traces)
