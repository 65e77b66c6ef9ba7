"""tr(G) without probes in weight space, and small Hessians' whole diagonals.

    tr(G) = (1/M) sum_i sum_k || J_i^T u_ik ||^2,   sum_k u_ik u_ik^T = A_i

The task's K columns u_k, a backward pass each, give it exactly; one with u_i = B_i e_i for random
signs e, E[e e^T] = I, gives it without bias and with little variance over many examples. The
blocks of a linear output layer need neither (`output_layer`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from hesstrace_cli.autodiff.calls import native_outputs
from hesstrace_cli.autodiff.graph import gradient
from hesstrace_cli.curvature.detached import CutWatch, check_attached
from hesstrace_cli.curvature.hessian import hvp
from hesstrace_cli.curvature.objective import Objective
from hesstrace_cli.curvature.per_example.independence import Unfit, check_independence, check_others
from hesstrace_cli.curvature.per_example.linearity import why_not_linear
from hesstrace_cli.curvature.per_example.norms import (
    check_layouts,
    differentiated_norms,
    gradients,
    rule_norms,
)
from hesstrace_cli.curvature.per_example.output_layer import output_layer
from hesstrace_cli.curvature.per_example.rules.layout import Layout, Norms, output_shape
from hesstrace_cli.curvature.per_example.uses import find_uses
from hesstrace_cli.curvature.probes import rademacher


class Curved(Unfit):
    """The outputs are not piecewise linear in the weights, so that tr(H) is not tr(G)."""


ACTIVATIONS = 1 << 27
"""Numbers in the outputs of all operations together, of the examples that are worked on at once."""


_Part = tuple[Tensor, Tensor, tuple[int, int] | None]  # X, y, its place among all of them


class PerExampleTrace:
    """The blocks' traces of every example's G_i = J_i^T A_i J_i, in the model's own mode.

    A batch is examined as it is used, since what a model executes may differ from one to the next:
    whether examples touch each other, which rows of an operation belong to which example and, if
    asked for, whether tr(H) = tr(G).

    Args:
        objective: The mean loss that G is of.
        X: A few examples, for the more thorough checks.
        linear: Whether outputs that are not piecewise linear in the weights are refused.

    Attributes:
        is_closed: Whether the output layer is all that there is, so that no columns are needed.

    Raises:
        Unfit: If the outputs of an example depend on the others in its batch, or are curved; so do
            the methods.
    """

    def __init__(self, objective: Objective, X: Tensor, *, linear: bool = False) -> None:
        self.objective = objective
        self.linear = linear
        self._examined: dict[tuple[int, int], dict[str, Layout]] = {}
        check_independence(self._outputs, X, Generator(X.device).manual_seed(0))
        found = self._outputs(X)
        self._check_linear(found)
        uses = find_uses(found, objective.params)
        self._layouts = check_layouts(found, uses)
        closed = output_layer(found, uses, objective.params, objective.task)
        self.is_closed = closed.keys() == objective.params.keys()
        self._by_row = {  # those with a row an example
            name for use in uses if use.num_rows == len(X) > 1
            for name in use.names.values() if name in self._layouts
        }  # fmt: skip
        outputs = sum(math.prod(output_shape(use.node)) for use in uses)
        self._at_once = max(1, ACTIVATIONS * len(X) // max(1, outputs))

    def _outputs(self, X: Tensor) -> Tensor:
        # The model's own operations: their first derivatives, all that is needed, are right.
        return native_outputs(self.objective.model, X)

    def _watched(self, X: Tensor) -> tuple[Tensor, bool]:
        """The outputs, and whether a value that was taken off the graph is used for them."""
        with CutWatch() as watch:
            outputs = self._outputs(X)
        return outputs, watch.found

    def _check_linear(self, outputs: Tensor) -> None:
        problem = why_not_linear(outputs, self.objective.params) if self.linear else None
        if problem is not None:
            raise Curved(problem)

    def without_rule(self) -> list[str]:
        """The parameters that have to be differentiated example by example."""
        return [name for name in self.objective.params if name not in self._layouts]

    def exact(self, X: Tensor, y: Tensor, number: int | None = None) -> Tensor:
        """M times each example's part of the blocks' traces, (N, T), a backward pass a column.

        Args:
            X: The batch.
            y: Its targets.
            number: Of the batch, if it comes again: it is then examined only once.
        """
        return torch.cat([self._exact(*part) for part in self._parts(X, y, number)])

    def _parts(self, X: Tensor, y: Tensor, number: int | None) -> Iterator[_Part]:
        size = self._at_once
        for index, (X_part, y_part) in enumerate(zip(X.split(size), y.split(size), strict=True)):
            yield X_part, y_part, None if number is None else (number, index)

    def _exact(self, X: Tensor, y: Tensor, key: tuple[int, int] | None) -> Tensor:
        outputs, is_cut = self._watched(X)
        layouts = self._examine(X, key, outputs, is_cut)
        closed = self._closed(outputs, y)
        total = self._stacked(closed, len(X))
        if closed.keys() == self.objective.params.keys():
            return total
        cotangents = self.objective.task.columns(outputs.detach(), y)
        if not len(cotangents):  # a softmax of one class is constant
            return total
        return total + self._blocks(X, outputs, cotangents, layouts, closed).sum(0)

    def _closed(self, outputs: Tensor, y: Tensor) -> Norms:
        """Each example's part of the output layer's blocks, (N,) by name."""
        objective = self.objective
        uses = find_uses(outputs, objective.params)
        squares = output_layer(outputs, uses, objective.params, objective.task)
        traces = objective.task.curvature_traces(outputs.detach(), y).flatten()
        return {n: (s * traces).reshape(len(outputs), -1).sum(1) for n, s in squares.items()}

    def _stacked(self, norms: Norms, num_examples: int) -> Tensor:
        """By parameter in the last dimension, 0 for those that are not in it: (N, T)."""
        params = self.objective.params
        zeros = next(iter(params.values())).new_zeros(num_examples)
        return torch.stack([norms.get(n, zeros).detach() for n in params], -1).double()

    def sample(
        self, X: Tensor, y: Tensor, num_samples: int, generator: Generator,
        number: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Unbiased samples of them, shape (num_samples, N, T), a backward pass each."""
        parts = []
        for X_part, y_part, key in self._parts(X, y, number):
            outputs, is_cut = self._watched(X_part)
            layouts = self._examine(X_part, key, outputs, is_cut)
            at, closed = outputs.detach(), self._closed(outputs, y_part)
            signs = rademacher(at.expand(num_samples, *at.shape), generator=generator)
            cotangents = [self.objective.task.root(at, y_part, e) for e in signs]
            own = self._blocks(X_part, outputs, torch.stack(cotangents), layouts, closed)
            parts.append(own + self._stacked(closed, len(X_part)))
        return torch.cat(parts, 1)

    def _blocks(
        self, X: Tensor, outputs: Tensor, cotangents: Tensor, layouts: dict[str, Layout],
        closed: Norms,
    ) -> Tensor:  # fmt: skip
        """The squared norms for each cotangent, (K, N, T); 0 for the blocks in closed form."""
        objective = self.objective
        uses = find_uses(outputs, {n: p for n, p in objective.params.items() if n not in closed})
        uses = [use for use in uses if layouts.keys() >= set(use.names.values())]
        rows = [rule_norms(uses, gradients(outputs, uses, u), layouts) for u in cotangents]
        norms = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        done = norms.keys() | closed.keys()
        rest = {name: p for name, p in objective.params.items() if name not in done}
        if rest:
            norms |= differentiated_norms(objective.outputs, rest, X, cotangents)
        zeros = cotangents.new_zeros(cotangents.shape[:2])
        return torch.stack([norms.get(n, zeros).detach() for n in objective.params], -1).double()

    def _examine(
        self, X: Tensor, key: tuple[int, int] | None, outputs: Tensor, is_cut: bool
    ) -> dict[str, Layout]:
        """The layouts of a batch, once it is known to fit."""
        if key in self._examined:
            return self._examined[key]
        try:
            check_others(self._outputs, X, outputs.detach(), Generator(X.device).manual_seed(0))
            self._check_linear(outputs)
            if is_cut:
                check_attached(self.objective, X)
        except Unfit as problem:
            if key is None:
                raise
            raise type(problem)(f"{problem} (in batch {key[0] + 1})") from None
        uses = find_uses(outputs, self.objective.params)
        certain = {
            name: Layout(len(X)) for use in uses for name in use.names.values()
            if use.num_rows == len(X) and name in self._by_row
        }  # fmt: skip
        doubtful = [use for use in uses if not certain.keys() >= set(use.names.values())]
        layouts = certain | check_layouts(outputs, doubtful)
        if key is not None:
            self._examined[key] = layouts
        return layouts


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
