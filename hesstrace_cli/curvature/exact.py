"""tr(G) without probes in weight space, and small Hessians' whole diagonals.

    tr(G) = (1/N) sum_i sum_c || J_i^T B_i e_c ||^2,   B B^T = A

C backward passes give it exactly; one with random signs e per example, E[e e^T] = I, gives it
without bias and with little variance over many examples.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hesstrace_cli.curvature.ggn import softmax_root
from hesstrace_cli.curvature.graph import gradient
from hesstrace_cli.curvature.hessian import hvp
from hesstrace_cli.curvature.objective import Objective, call_as_it_is
from hesstrace_cli.curvature.per_example import (
    check_layouts,
    differentiated_norms,
    find_uses,
    rule_norms,
)
from hesstrace_cli.curvature.probes import rademacher


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
        logits = self._logits(X)
        self._layouts = check_layouts(logits, find_uses(logits, objective.params))

    def _logits(self, X: Tensor) -> Tensor:
        # The model's own operations: their first derivatives, all that is needed, are right.
        return call_as_it_is(self.objective.model, X)

    def without_rule(self) -> list[str]:
        """The parameters that have to be differentiated example by example."""
        return [name for name in self.objective.params if name not in self._layouts]

    def exact(self, X: Tensor) -> Tensor:
        """Tr of every diagonal block of every G_i, shape (N, T), by C backward passes."""
        logits = self._logits(X)
        num_classes = logits.shape[1]
        eye = torch.eye(num_classes, dtype=logits.dtype, device=logits.device)
        e = eye[:, None, :].expand(-1, len(X), -1)
        return self._blocks(X, logits, e).sum(0)

    def sample(self, X: Tensor, num_samples: int, generator: Generator) -> Tensor:
        """Unbiased samples of them, shape (num_samples, N, T), a backward pass each."""
        logits = self._logits(X)
        like = logits.detach().expand(num_samples, *logits.shape)
        return self._blocks(X, logits, rademacher(like, generator=generator))

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
            column = torch.zeros_like(p)
            column.view(-1)[index] = 1
            total += hvp(grad, params, {name: column})[name].view(-1)[index].detach()
        traces.append(total)
    return torch.stack(traces)
