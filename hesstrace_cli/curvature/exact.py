"""tr(G) without probes in weight space, and small Hessians' whole diagonals.

    tr(G) = (1/N) sum_i sum_c || J_i^T B_i e_c ||^2,   B B^T = A

C - 1 backward passes give it exactly; one with random signs e per example, E[e e^T] = I, gives it
without bias and with little variance over many examples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hesstrace_cli.curvature.ggn import softmax_root
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


def columns(logits: Tensor) -> Tensor:
    """C - 1 orthonormal vectors e_c per example with sum_c B e_c e_c^T B^T = A, shape (C-1, N, C).

    B sqrt(p) = 0, so that the columns of a reflection that takes the last axis to sqrt(p) are
    enough without that last one.
    """
    normal = torch.exp(F.log_softmax(logits, -1) / 2)
    normal[:, -1] += 1
    normal = normal / normal.norm(dim=-1, keepdim=True)
    eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)[:-1, None]
    return eye - 2 * normal[:, :-1].T[..., None] * normal


ACTIVATIONS = 1 << 27
"""Numbers in the outputs of all operations together, of the examples that are worked on at once."""


class PerExampleTrace:
    """The blocks' traces of every example's G_i = J_i^T A_i J_i, in the model's own mode.

    Args:
        objective: The mean loss; softmax cross-entropy of its logits is what G is of.
        X: A batch, to learn how operations arrange the examples; any other may follow.

    Raises:
        MixedExamples: If the logits of an example depend on the others in its batch.
    """

    def __init__(self, objective: Objective, X: Tensor) -> None:
        self.objective = objective
        check_independence(self._logits, X, Generator(X.device).manual_seed(0))
        logits = self._logits(X)
        uses = find_uses(logits, objective.params)
        self._layouts = check_layouts(logits, uses)
        outputs = sum(math.prod(output_shape(use.edge.node)) for use in uses)
        self._at_once = max(1, ACTIVATIONS * len(X) // max(1, outputs))

    def _logits(self, X: Tensor) -> Tensor:
        # The model's own operations: their first derivatives, all that is needed, are right.
        return call_as_it_is(self.objective.model, X)

    def without_rule(self) -> list[str]:
        """The parameters that have to be differentiated example by example."""
        return [name for name in self.objective.params if name not in self._layouts]

    def exact(self, X: Tensor) -> Tensor:
        """Traces of the diagonal blocks of every G_i, shape (N, T), by C - 1 backward passes."""
        return torch.cat([self._exact(part) for part in X.split(self._at_once)])

    def _exact(self, X: Tensor) -> Tensor:
        logits = self._logits(X)
        if logits.shape[1] == 1:  # a softmax of one class is constant
            return logits.new_zeros(len(X), len(self.objective.params), dtype=torch.float64)
        return self._blocks(X, logits, columns(logits.detach())).sum(0)

    def sample(self, X: Tensor, num_samples: int, generator: Generator) -> Tensor:
        """Unbiased samples of them, shape (num_samples, N, T), a backward pass each."""
        parts = []
        for part in X.split(self._at_once):
            logits = self._logits(part)
            like = logits.detach().expand(num_samples, *logits.shape)
            parts.append(self._blocks(part, logits, rademacher(like, generator=generator)))
        return torch.cat(parts, 1)

    def _blocks(self, X: Tensor, logits: Tensor, e: Tensor) -> Tensor:
        objective = self.objective
        uses = find_uses(logits, objective.params)
        rows = []
        for signs in e:
            u = softmax_root(logits, signs).detach()
            rows.append(rule_norms(logits, uses, u, self._layouts))
        norms = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        rest = {name: p for name, p in objective.params.items() if name not in norms}
        if rest:
            norms |= differentiated_norms(objective.logits, rest, X, softmax_root, e)
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
